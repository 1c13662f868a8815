"""Writes the generated pages under docs/: ``python tools/make_docs.py``; with ``--check`` fails where one is stale."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from compatibility_names import page as compatibility_names
from failure_classes import page as failure_classes

from halfbyte import _env
from halfbyte.doctor import reference

DOCS = Path(__file__).parent.parent / "docs"


def environment() -> str:
    """The table of environment variables."""
    rows = [
        f"| `{v.name}` | {v.kind.__name__} | {f'`{v.default}`' if v.default != '' else 'empty'} | {v.doc} |"
        for v in sorted(_env.VARIABLES, key=lambda v: v.name)
    ]
    head = "# Environment variables\n\n| name | type | default | meaning |\n|--|--|--|--|\n"
    return head + "\n".join(rows) + "\n"


def checks() -> str:
    """The page of the doctor's checks."""
    import_module("halfbyte.doctor.checks")  # registers them
    return reference.markdown()


PAGES: dict[str, Callable[[], str]] = {
    "checks.md": checks,
    "compatibility-names.md": compatibility_names,
    "environment.md": environment,
    "failure-classes.md": failure_classes,
}


def main() -> int:
    """Write, or check, every page."""
    check = "--check" in sys.argv[1:]
    stale = []
    for name, make in PAGES.items():
        path, text = DOCS / name, make()
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            stale.append(name)
        elif not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"stale: {', '.join(stale)}; run: python tools/make_docs.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
