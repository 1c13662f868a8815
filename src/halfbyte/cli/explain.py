"""``halfbyte explain``: the cause and the command for an error text, a failure class or a check; works offline."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.doctor import catalogue, pages
from halfbyte.doctor.explain import Match, explain, is_code
from halfbyte.doctor.fixes import TOOLS, Tool, detect_tool
from halfbyte.doctor.host import Host
from halfbyte.doctor.privacy import Redactor
from halfbyte.errors import ArgumentError

__all__ = ["main"]

_REPORT = (
    "Nothing is known here about this text.",
    "",
    "  check this machine:  python -m halfbyte",
    "  report it:           python -m halfbyte --markdown > report.md",
    "                       and open an issue with that report and the whole text,",
    "                       from the first error on.",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="halfbyte explain",
        description="Name the cause and the command for an error text, a failure class or a check.",
        epilog="exit status: 0 explained, 1 unknown, 2 wrong command line",
    )
    parser.add_argument(
        "what",
        nargs="?",
        help="an id (A2), a check's code (GPU101), a file with the error, the text in quotes, or - for standard input",
    )
    parser.add_argument("--list", action="store_true", help="show every failure class")
    parser.add_argument("--json", action="store_true", help="machine readable")
    parser.add_argument("-v", "--verbose", action="store_true", help="show every match in full, not only the first")
    parser.add_argument("--tool", choices=TOOLS, help="phrase commands for this installer (found by itself)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``halfbyte explain``; returns 0 explained, 1 unknown, 2 wrong command line."""
    try:
        options = _parser().parse_args(list(argv))
    except SystemExit as stop:  # argparse has printed its message
        return 0 if stop.code in {0, None} else 2
    host = Host.here()
    tool: Tool = options.tool or detect_tool(host.environ, host.prefix, host.cwd)
    width = min(shutil.get_terminal_size((80, 24)).columns, 80)
    if options.list:
        _print(
            options.json,
            {"classes": [pages.class_data(entry, tool) for entry in catalogue.CLASSES]},
            pages.overview_lines(width),
        )
        return 0
    word: str = options.what or ("-" if not sys.stdin.isatty() else "")
    if not word:
        raise ArgumentError(
            "nothing to explain",
            expected="an id, a code, a file, or - for standard input",
            hint="halfbyte explain --list",
        )
    if is_code(word) and not Path(word).is_file():
        return _explain_code(word, tool, width, options.json)
    redactor = Redactor.of(host)
    matches = [replace(match, excerpt=redactor.text(match.excerpt)) for match in explain(_text(word))]
    lines = _lines(matches, tool, width, options.verbose) if matches else list(_REPORT)
    _print(
        options.json,
        {"explained": bool(matches), "matches": [pages.match_data(match, tool) for match in matches]},
        lines,
    )
    return 0 if matches else 1


def _explain_code(code: str, tool: Tool, width: int, as_json: bool) -> int:
    entry = catalogue.get(code)
    if entry is not None:
        data = {"explained": True, "matches": [pages.class_data(entry, tool)]}
        _print(as_json, data, pages.class_lines(entry, tool, width))
        return 0
    made = pages.find_check(code)
    if made is not None:
        classes = [found for found in map(catalogue.get, made.classes) if found is not None]
        data = {
            "explained": True,
            "check": pages.check_data(made),
            "matches": [pages.class_data(found, tool) for found in classes],
        }
        _print(as_json, data, pages.check_lines(made, tool, width))
        return 0
    unknown = [
        f"No failure class or check is called {code}.",
        "",
        "  all classes:  halfbyte explain --list",
        "  all checks:   python -m halfbyte --list",
    ]
    _print(as_json, {"explained": False, "matches": []}, unknown)
    return 1


def _lines(matches: Sequence[Match], tool: Tool, width: int, verbose: bool) -> list[str]:
    if verbose:
        return [line for match in matches for line in ["", *pages.match_lines(match, tool, width)]][1:]
    lines = pages.match_lines(matches[0], tool, width)
    if len(matches) > 1:
        lines += [
            "",
            "Also in this text (halfbyte explain ID tells more)",
            "",
            *pages.related_lines(matches[1:], width),
        ]
    return lines


def _text(word: str) -> str:
    """The text that a word of the command line stands for.

    Raises:
        ArgumentError: It is the name of a file that cannot be read.
    """
    if word == "-":
        return _decoded(sys.stdin.buffer.read())
    path = Path(word)
    try:
        if len(word.split()) > 1 and ("\n" in word or not path.is_file()):
            return word
        return _decoded(path.read_bytes())
    except OSError as error:
        raise ArgumentError(
            f"cannot read {word}: {error.strerror}",
            hint='halfbyte explain - takes standard input, halfbyte explain "TEXT" a text',
        ) from None


def _decoded(data: bytes) -> str:
    # PowerShell's > writes UTF-16 with a byte order mark.
    encoding = "utf-16" if data[:2] in {b"\xff\xfe", b"\xfe\xff"} else "utf-8"
    return data.decode(encoding, errors="replace")


def _print(as_json: bool, data: dict[str, Any], lines: Sequence[str]) -> None:
    text = json.dumps({"schema": pages.SCHEMA, **data}, indent=2) if as_json else "\n".join(lines)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, errors="replace").decode(encoding), flush=True)
    except BrokenPipeError:  # the reader (head, less) has seen enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
