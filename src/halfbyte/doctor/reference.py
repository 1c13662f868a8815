"""The documentation of the checks, made from the registry: a list for the terminal, a page for the docs."""

from __future__ import annotations

from collections.abc import Iterator

from halfbyte.doctor import registry
from halfbyte.doctor.model import Layer, Level

__all__ = ["listing", "markdown"]


def listing() -> str:
    """Code, level and title of every check, one a line."""
    return "\n".join(f"{each.code:<10} {each.level.value:<8} {each.title}" for each in registry.checks()) + "\n"


def markdown() -> str:
    """A page with every check's documentation."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Checks of the doctor"
    yield ""
    yield "Made by `halfbyte doctor --list --markdown`. Codes are stable. `halfbyte doctor --only CODE` runs one"
    yield "check and what it requires. Failure classes (A1 to G6) are those of `halfbyte explain`."
    for layer in Layer:
        yield ""
        yield f"## {layer.heading}"
        for check in registry.checks():
            if check.layer is layer:
                yield from _check(check)


def _check(check: registry.Check) -> Iterator[str]:
    yield ""
    yield f"### {check.code}: {check.title}"
    yield ""
    for heading, body in check.sections.items():
        yield f"**{heading}.** {body[:1].upper()}{body[1:]}"
        yield ""
    parts = [f"Level: {_level(check)}"]
    parts += [f"requires {', '.join(check.requires)}"] if check.requires else []
    parts += [f"{check.proof} tries it"] if check.proof else []
    parts += [f"detects {', '.join(check.classes)}"] if check.classes else []
    yield "; ".join(parts) + "."


def _level(check: registry.Check) -> str:
    return check.level.value if check.level is not Level.QUICK else "quick (reads files only)"
