"""``python -m halfbyte`` is the ``halfbyte`` command; without arguments it is the doctor."""

import sys

from halfbyte.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
