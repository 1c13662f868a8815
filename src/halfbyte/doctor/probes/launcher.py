"""Starts one probe in a child process: takes the parent's search path, runs it, says how it went. Run by its path."""

import sys

sys.path.pop(0)  # this folder must not stand before the standard library

import importlib
import json
import traceback
from typing import Any


def main() -> int:
    request = json.loads(sys.argv[1])
    sys.path[:] = request["path"]

    def emit(event: str, **values: Any) -> None:
        sys.stdout.write("\n" + request["mark"] + json.dumps({"event": event, **values}, default=str) + "\n")
        sys.stdout.flush()

    try:
        importlib.import_module(f"halfbyte.doctor.probes.{request['program']}").run(request["arguments"], emit)
    except BaseException as error:  # the parent must learn of SystemExit as well
        traceback.print_exc()
        emit("error", text=f"{type(error).__name__}: {error}", trace=traceback.format_exc()[-3000:])
        return 1
    emit("done")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
