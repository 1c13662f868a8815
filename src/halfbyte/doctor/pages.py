"""What ``halfbyte explain`` shows of a match, a class or a check: as lines for 80 columns, and as data for JSON."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from halfbyte.doctor import catalogue
from halfbyte.doctor.catalogue import FailureClass, Remedy
from halfbyte.doctor.explain import Match
from halfbyte.doctor.fixes import Tool, after_install
from halfbyte.doctor.registry import Check, checks

__all__ = [
    "SCHEMA",
    "check_data",
    "check_lines",
    "class_data",
    "class_lines",
    "find_check",
    "match_data",
    "match_lines",
    "overview_lines",
    "related_lines",
]

SCHEMA = "halfbyte.explain/1"
"""Name and version of the JSON form; the number goes up when a key changes its meaning or goes away."""

_KIND = {"cause": "can be the root cause", "symptom": "a symptom of something else", "notice": "breaks nothing"}


def _registered() -> tuple[Check, ...]:
    importlib.import_module("halfbyte.doctor.checks")  # registers them
    return checks()


def find_check(code: str) -> Check | None:
    """The check with a code, in any case; None for an unknown one."""
    return next((made for made in _registered() if made.code == code.upper()), None)


def _detected_by(entry: FailureClass) -> tuple[str, ...]:
    return tuple(made.code for made in _registered() if entry.id in made.classes)


def _wrapped(text: str, width: int, label: str = "") -> list[str]:
    """``text`` with its label in a column of eight characters."""
    return textwrap.wrap(
        text,
        max(width, 40),
        initial_indent=f"  {label:<8}",
        subsequent_indent=" " * 10,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _fix_lines(remedies: Iterable[Remedy], tool: Tool, width: int) -> list[str]:
    lines: list[str] = []
    for remedy in remedies:
        fix = remedy.fix(tool)
        lines += _wrapped(fix.title, width, "fix:")
        lines += [f"            {line}" for line in fix.command.splitlines()]
    note = after_install(tool)
    if note and any(remedy.install for remedy in remedies):
        lines += _wrapped(note, width)
    return lines


def _body(entry: FailureClass, remedies: Sequence[Remedy], tool: Tool, width: int) -> list[str]:
    lines = _wrapped(entry.cause, width, "cause:")
    lines += _fix_lines(remedies, tool, width)
    if entry.here:
        lines += _wrapped(entry.here, width, "here:")
    codes = _detected_by(entry)
    if codes:
        lines += _wrapped(f"python -m halfbyte --only {codes[0]}", width, "check:")
    return lines


def match_lines(match: Match, tool: Tool, width: int = 80) -> list[str]:
    """The whole answer for one match."""
    lines = [f"{match.entry.id}  {match.entry.title}", ""]
    lines += _wrapped(f"line {match.line}: {match.excerpt}", width, "seen:")
    if match.note:
        lines += _wrapped(match.note, width, "means:")
    return lines + _body(match.entry, match.remedies, tool, width)


def related_lines(matches: Sequence[Match], width: int = 80) -> list[str]:
    """One entry for each of the matches that come after the first."""
    lines: list[str] = []
    for match in matches:
        reason = f"follows from {', '.join(match.behind)}" if match.behind else _KIND[match.entry.kind]
        lines += _wrapped(f"{match.entry.title} (line {match.line}; {reason})", width, match.entry.id)
    return lines


def class_lines(entry: FailureClass, tool: Tool, width: int = 80) -> list[str]:
    """The page of one class."""
    lines = [f"{entry.id}  {entry.title}", ""]
    lines += _body(entry, entry.remedies, tool, width)
    silent = "; no message shows it" if entry.silent else ""
    lines += _wrapped(_KIND[entry.kind] + silent, width, "kind:")
    return lines + [line for source in entry.sources for line in _wrapped(source, width, "source:")]


def check_lines(made: Check, tool: Tool, width: int = 80) -> list[str]:
    """The page of one check."""
    lines = [f"{made.code}  {made.title}", ""]
    for heading, text in made.sections.items():
        lines += [f"  {heading}", *textwrap.wrap(text, max(width, 40), initial_indent="    ", subsequent_indent="    ")]
    if made.requires:
        lines += ["", f"  only after: {', '.join(made.requires)}"]
    named = [entry for entry in map(catalogue.get, made.classes) if entry is not None]
    lines += ["", f"  run it: python -m halfbyte --only {made.code}"]
    for entry in named:
        lines += ["", *class_lines(entry, tool, width)]
    return lines


def overview_lines(width: int = 80) -> list[str]:
    """Every class, one a line, under its group."""
    lines: list[str] = []
    for letter, heading in catalogue.GROUPS.items():
        lines += ["", heading]
        for entry in catalogue.CLASSES:
            if entry.id.startswith(letter):
                lines += textwrap.wrap(
                    entry.title, width, initial_indent=f"  {entry.id:<4} ", subsequent_indent=" " * 7
                )
    return lines[1:]


def class_data(entry: FailureClass, tool: Tool, remedies: Sequence[Remedy] | None = None) -> dict[str, Any]:
    """One class for JSON."""
    fixes = [remedy.fix(tool) for remedy in (entry.remedies if remedies is None else remedies)]
    return {
        "id": entry.id,
        "title": entry.title,
        "kind": entry.kind,
        "cause": entry.cause,
        "fixes": [{"title": fix.title, "command": fix.command, "safe": fix.safe} for fix in fixes],
        "here": entry.here,
        "checks": list(_detected_by(entry)),
        "sources": list(entry.sources),
    }


def match_data(match: Match, tool: Tool) -> dict[str, Any]:
    """One match for JSON: the class, and where it was seen."""
    seen = {"line": match.line, "text": match.excerpt, "means": match.note, "follows_from": list(match.behind)}
    return {**class_data(match.entry, tool, match.remedies), "seen": seen}


def check_data(made: Check) -> dict[str, Any]:
    """One check for JSON."""
    return {
        "code": made.code,
        "title": made.title,
        "sections": dict(made.sections),
        "requires": list(made.requires),
        "classes": list(made.classes),
    }
