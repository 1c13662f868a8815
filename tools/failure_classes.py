"""The page of failure classes: each with cause, way out, what finds it, and what tests it."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

from halfbyte.doctor import catalogue, registry
from halfbyte.doctor.catalogue import FailureClass

__all__ = ["page"]

TESTS = Path(__file__).parent.parent / "tests" / "doctor"

_ABOUT_TEXTS = {"test_catalogue", "test_explain", "test_explain_command", "test_class_coverage"}

HEAD = """\
# Failure classes

Every way in which an environment for quantized models is known to break, as `halfbyte explain` and
`python -m halfbyte` know it. `halfbyte explain ID` shows one with all its sources; `halfbyte explain FILE` finds the
classes in an error text.

*Found by* names the checks that detect a class on a machine, and `explain` where a message shows it; *by design* means
that halfbyte cannot get there. *Tests* are files of `tests/doctor`: `test_explain` holds each message of a class
against its answer, bare and inside logs. A class marked *symptom* always has another one behind it; a *notice* breaks
nothing.
"""


def page() -> str:
    """The whole page."""
    texts = {name: len(found) for name, found in json.loads(_read(TESTS / "texts" / "exact.json")).items()}
    named = {path.stem: _read(path) for path in sorted(TESTS.glob("test_*.py")) if path.stem not in _ABOUT_TEXTS}
    named["test_classes"] += "".join(_read(path) for path in sorted(TESTS.glob("cases_*.py")))
    import_module("halfbyte.doctor.checks")  # registers them
    lines = [HEAD]
    for letter, heading in catalogue.GROUPS.items():
        lines += [
            f"## {letter}. {heading}",
            "",
            "| id | failure | cause | way out | found by | tests |",
            "|--|--|--|--|--|--|",
        ]
        for entry in catalogue.CLASSES:
            if entry.id.startswith(letter):
                lines.append(_row(entry, texts.get(entry.id, 0), named))
        lines.append("")
    return "\n".join(lines)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _row(entry: FailureClass, texts: int, named: dict[str, str]) -> str:
    mark = "" if entry.kind == "cause" else f" *({entry.kind})*"
    found = [f"`{made.code}`" for made in registry.checks() if entry.id in made.classes]
    if not entry.silent:
        found.append("`explain`")
    tests = [f"`test_explain` ({texts} texts)"] * bool(texts)
    tests += [f"`{name}`" for name, text in named.items() if re.search(rf'"{entry.id}["-]', text)]
    cause = f"{entry.cause} {entry.here}".strip()
    cells = [
        entry.id,
        entry.title + mark,
        cause,
        _ways_out(entry),
        ", ".join(found) or "by design",
        ", ".join(tests) or "-",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _ways_out(entry: FailureClass) -> str:
    parts: list[str] = []
    for remedy in entry.remedies:
        fix = remedy.fix("pip")
        commands = [f"`{line}`" for line in fix.command.splitlines() if not line.startswith("#")]
        parts.append(fix.title + (": " + " ".join(commands) if commands else ""))
    return "; ".join(parts)
