"""``halfbyte doctor``: checks and proves this environment, says what is broken and what to type."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Generator, Sequence
from pathlib import Path

from halfbyte.doctor import checks as _register_checks
from halfbyte.doctor import facts as _register_facts
from halfbyte.doctor import reference, registry, repair
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Level
from halfbyte.doctor.privacy import Redactor
from halfbyte.doctor.report import Report, compose, json, markdown, text
from halfbyte.doctor.report.contents import DOCTOR_FAILED
from halfbyte.doctor.run import Facts, run_checks
from halfbyte.errors import HalfbyteError

__all__ = ["main"]

_REGISTERED = (_register_checks, _register_facts)

EPILOG = "exit codes: 0 works, 1 works with limits, 2 broken, 3 the doctor itself failed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="halfbyte doctor", description="Check and prove this environment; say what to type.", epilog=EPILOG
    )
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="read files only; nothing is imported or computed")
    level.add_argument("--full", action="store_true", help="also time, and prove every backend with more shapes")
    parser.add_argument("--only", metavar="CODE", action="append", default=[], help="this check, or this prefix (GPU)")
    parser.add_argument(
        "--list", action="store_true", help="list the checks and stop (with --markdown: their documentation)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show what passed and every number as well")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown for a bug report")
    parser.add_argument(
        "--fix", action="store_true", help="offer to do what is reversible and only touches your own files"
    )
    parser.add_argument("--yes", action="store_true", help="with --fix: do not ask")
    parser.add_argument("--timeout", type=float, default=0.0, metavar="SECONDS", help="for each child process")
    parser.add_argument(
        "--root", type=Path, default=Path("/"), metavar="DIR", help="read /proc, /sys, /dev, /etc from here"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the doctor; returns the exit code."""
    options = _parser().parse_args(list(argv))
    if options.list:
        print(reference.markdown() if options.markdown else reference.listing(), end="")
        return 0
    try:
        return _examine(options)
    except HalfbyteError:
        raise
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DOCTOR_FAILED
    except Exception:
        print(Redactor.of(Host.here()).text(traceback.format_exc()), file=sys.stderr)
        print("The doctor itself failed. Please report the lines above.", file=sys.stderr)
        return DOCTOR_FAILED


def _examine(options: argparse.Namespace) -> int:
    start = time.monotonic()
    level = Level.QUICK if options.quick else Level.FULL if options.full else Level.DEFAULT
    selected, asked = registry.select(level, options.only)
    steps = frozenset(step for check in selected for step in check.steps)
    host = Host.here(root=options.root, timeout=options.timeout, full=level is Level.FULL, steps=steps)
    facts = Facts(host)
    with _patience(level):
        findings = run_checks(facts, selected, asked)
    report = compose(facts, findings, level, time.monotonic() - start)
    if options.json:
        print(json.render(report))
    elif options.markdown:
        print(markdown.render(report), end="")
    else:
        text.show(report, verbose=options.verbose)
    if options.fix:
        _fix(report, host, ask=not options.yes)
    return report.exit_code


@contextlib.contextmanager
def _patience(level: Level) -> Generator[None, None, None]:
    """Tell someone at a terminal that it takes a while, and take that line away again."""
    shown = level is not Level.QUICK and sys.stderr.isatty()
    if shown:
        print("Computing on every device, in child processes ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)


def _fix(report: Report, host: Host, *, ask: bool) -> None:
    """Show what can be done here, and do it when told to. Goes to standard error: the report keeps its stream."""
    chosen = repair.plan(report.findings, host.home)
    shorter = Redactor.of(host).text
    if not chosen:
        print(
            "Nothing here can be fixed without changing packages or the system; the commands above do that.",
            file=sys.stderr,
        )
        return
    print("\n".join(["", *(shorter(line) for line in chosen.lines)]), file=sys.stderr)
    if ask:
        if not sys.stdin.isatty():
            print("Nothing was done. To do it, add: --yes", file=sys.stderr)
            return
        print("Do this? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
            return
    try:
        repair.carry_out(chosen)
    except OSError as error:
        print(f"That did not work: {shorter(str(error))}", file=sys.stderr)
        return
    if chosen.exports:
        print(f"Done. To use it, type: . {shorter(str(chosen.file))}    To undo it, remove that file.", file=sys.stderr)
