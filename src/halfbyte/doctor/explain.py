"""Names the failure class behind a text, or the page of a code. Pure functions; nothing here looks at the machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.doctor import catalogue
from halfbyte.doctor.catalogue import FailureClass, Reading, Remedy

__all__ = ["LIMIT", "Match", "explain", "is_code"]

LIMIT = 600_000
"""Characters of a text that are looked at; of a longer one its two ends, where errors start and end."""

_COLOUR = re.compile(r"(?:\x1b|\\u001b|\\x1b)\[[0-9;]*[A-Za-z]")  # also as a notebook's file spells it
_EXCERPT = 200


@dataclass(frozen=True)
class Match:
    """A failure class that a text shows.

    Attributes:
        entry: The class.
        line: Where in the text, from 1.
        excerpt: That line.
        behind: Ids of other classes in the same text that cause this one.
        note: What the numbers in the text mean; empty where there are none.
        remedies: Ways out, best first.
    """

    entry: FailureClass
    line: int
    excerpt: str
    behind: tuple[str, ...]
    note: str
    remedies: tuple[Remedy, ...]


def is_code(text: str) -> bool:
    """Whether a word looks like the id of a class or the code of a check, rather than a message.

    >>> is_code("A2"), is_code("GPU101"), is_code("error: A2 failed")
    (True, True, False)
    """
    return bool(re.fullmatch(r"[A-Za-z]{1,8}\d{1,4}", text.strip()))


def explain(text: str) -> tuple[Match, ...]:
    """Every failure class that a text shows, root cause first; empty for a text that shows none.

    First come causes, then mere symptoms, then what another match has caused, then harmless notices; among equals the
    one that stands first in the text, since what follows the first error is often its consequence.

    >>> [match.entry.id for match in explain("The NVIDIA driver on your system is too old\\n0 active drivers ([])")]
    ['A2', 'D6']
    """
    text = _COLOUR.sub("", text)
    if len(text) > LIMIT:
        text = text[: LIMIT // 2] + "\n" + text[-LIMIT // 2 :]
    found = {entry.id: _search(entry, text) for entry in catalogue.CLASSES}
    hits = {name: matches for name, matches in found.items() if matches}
    ranked = sorted(hits, key=lambda name: _rank(name, hits))
    return tuple(_match(name, hits, text) for name in ranked)


def _search(entry: FailureClass, text: str) -> tuple[re.Match[str], ...]:
    searched = (pattern.search(text) for pattern in entry.patterns)
    return tuple(match for match in searched if match is not None)


def _rank(name: str, hits: dict[str, tuple[re.Match[str], ...]]) -> tuple[int, int, int]:
    entry = _entry(name)
    if entry.kind == "notice":
        group = 3
    elif any(other in hits for other in entry.follows):
        group = 2
    else:
        group = 1 if entry.kind == "symptom" else 0
    first = min(match.start() for match in hits[name])
    return group, first, catalogue.CLASSES.index(entry)


def _entry(name: str) -> FailureClass:
    entry = catalogue.get(name)
    if entry is None:
        raise KeyError(name)
    return entry


def _match(name: str, hits: dict[str, tuple[re.Match[str], ...]], text: str) -> Match:
    entry = _entry(name)
    first = min(hits[name], key=lambda match: match.start())
    reading = _reading(entry, hits[name])
    end = text.find("\n", first.start())
    start = text.rfind("\n", 0, first.start()) + 1
    excerpt = text[start : end if end >= 0 else None].strip()
    if len(excerpt) > _EXCERPT:
        excerpt = text[first.start() : first.start() + _EXCERPT].split("\n")[0].strip() + " ..."
    general = tuple(remedy for remedy in entry.remedies if remedy.install == "" or remedy not in reading.remedies)
    return Match(
        entry,
        line=text.count("\n", 0, first.start()) + 1,
        excerpt=excerpt,
        behind=tuple(other for other in entry.follows if other in hits),
        note=reading.note,
        remedies=reading.remedies + general,
    )


def _reading(entry: FailureClass, matches: Sequence[re.Match[str]]) -> Reading:
    if entry.read is not None:
        for match in matches:
            reading = entry.read(match)
            if reading is not None:
                return reading
    return Reading("")
