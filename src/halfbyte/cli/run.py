"""``halfbyte run``: runs a script or module as Python would, with halfbyte in the place of bitsandbytes."""

from __future__ import annotations

import builtins
import io
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

from halfbyte.errors import ArgumentError
from halfbyte.integrations.bitsandbytes import install_as_bitsandbytes

__all__ = ["main"]

USAGE = """\
usage: halfbyte run [--replace] script.py [arguments]
       halfbyte run [--replace] -m module [arguments]

Runs a script, a folder or zip file with a __main__.py, or a module, exactly as `python` would; in its process
`import bitsandbytes` gives halfbyte. Processes that the script starts are plain Python again: for those install the
small distribution in shim/.

  --replace  go before a bitsandbytes that is installed here"""


def main(argv: Sequence[str]) -> int:
    """Run what the words name; returns what its process would have returned."""
    words = list(argv)
    if words and words[0] in {"-h", "--help"}:
        print(USAGE)
        return 0
    replace = words[:1] == ["--replace"]
    if replace:
        del words[0]
    as_module = words[:1] == ["-m"]
    if as_module:
        del words[0]
    if not words or (words[0].startswith("-") and not as_module):
        print(f"halfbyte run: no script or module to run\n\n{USAGE}", file=sys.stderr)
        return 2
    target, arguments = words[0], words[1:]
    if not as_module and not Path(target).exists():
        raise ArgumentError(f"there is no file {target}", hint=f"for a module: `halfbyte run -m {target}`")
    install_as_bitsandbytes(replace)
    sys.argv = [target, *arguments]
    return _reported(lambda: _run_module(target) if as_module else _run_path(Path(target)))


def _run_module(name: str) -> None:
    _set_path(str(Path.cwd()))
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_path(path: Path) -> None:
    if path.is_dir() or path.suffix in {".zip", ".pyz"}:
        _drop_path()
        runpy.run_path(str(path.absolute()), run_name="__main__")
        return
    _set_path(str(path.resolve().parent))
    name = str(path.absolute())
    main_module = ModuleType("__main__")
    loader = SourceFileLoader("__main__", name)
    vars(main_module).update(__file__=name, __builtins__=builtins, __cached__=None, __loader__=loader)
    with io.open_code(name) as file:
        code = compile(file.read(), name, "exec")
    sys.modules["__main__"] = main_module
    exec(code, vars(main_module))


def _set_path(folder: str) -> None:
    """Let ``sys.path[0]`` be what Python would have put there."""
    _drop_path()
    if not _safe_path():
        sys.path.insert(0, folder)


def _drop_path() -> None:
    # What stands first is the folder of the halfbyte command, or the current one under `python -m halfbyte`.
    if not _safe_path() and sys.path:
        del sys.path[0]


def _safe_path() -> bool:
    """Whether Python was told to put no folder first (``-P`` from 3.11, ``-I``)."""
    return bool(getattr(sys.flags, "safe_path", sys.flags.isolated))


def _reported(action: Callable[[], None]) -> int:
    """0, or 1 after an error whose traceback was printed without the frames of this command."""
    try:
        action()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        error.__traceback__ = _own(error.__traceback__)
        if isinstance(error, ImportError) and error.__traceback__ is None:
            print(f"halfbyte run: {error}", file=sys.stderr)
        else:
            sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def _own(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame that belongs to the script."""
    machinery = {__file__, runpy.__file__, "<frozen runpy>"}
    while trace is not None and trace.tb_frame.f_code.co_filename in machinery:
        trace = trace.tb_next
    return trace
