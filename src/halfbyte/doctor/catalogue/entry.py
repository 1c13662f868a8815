"""What the catalogue says about one failure class: its texts, cause and ways out. No class is described here."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from halfbyte.doctor.fixes import Tool, install_command
from halfbyte.doctor.model import Fix

__all__ = ["FailureClass", "Kind", "Reading", "Remedy", "compiled"]

Kind = Literal["cause", "symptom", "notice"]
"""``cause`` can be the root; a ``symptom`` always has another class behind it; a ``notice`` is a message that breaks
nothing, so anything else in the same text comes first."""

_GAP = r"[\s\u2502|>]+"  # a terminal or a boxed traceback may have broken the line in the middle of a sentence
_QUOTES = "'\"`\u2018\u2019\u00b4"
_TOKEN = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]| |'")


def compiled(text: str) -> re.Pattern[str]:
    """A pattern in which a space stands for any gap and an apostrophe for any quotation mark.

    >>> bool(compiled("no module named 'x'").search("No module\\n    named `x`"))
    True
    """

    def replace(token: re.Match[str]) -> str:
        if token[0] == " ":
            return _GAP
        return f"[{_QUOTES}]" if token[0] == "'" else token[0].replace("'", _QUOTES)

    return re.compile(_TOKEN.sub(replace, text), re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Remedy:
    """One way out, before the installer is known.

    Attributes:
        title: What it does.
        command: What to type, the same for everyone.
        install: A requirement instead, to be phrased for the installer.
        index_url: Where that comes from; None for the default.
        upgrade: Install a newer version of it.
        force: Install it again.
        safe: Reversible and within the user's own files.
    """

    title: str
    command: str = ""
    install: str = ""
    index_url: str | None = None
    upgrade: bool = False
    force: bool = False
    safe: bool = False

    def fix(self, tool: Tool) -> Fix:
        """The same with the installer's words.

        >>> Remedy("Upgrade", install="bitsandbytes", upgrade=True).fix("uv").command
        'uv pip install --upgrade bitsandbytes'
        """
        if not self.install:
            return Fix(self.title, self.command, self.safe)
        command = install_command(tool, self.install, index_url=self.index_url, upgrade=self.upgrade, force=self.force)
        return Fix(self.title, command, self.safe)


@dataclass(frozen=True)
class Reading:
    """What the numbers in one text mean.

    Attributes:
        note: In a sentence.
        remedies: Ways out for these numbers; they come before the general ones. Empty keeps only those.
    """

    note: str
    remedies: tuple[Remedy, ...] = ()


@dataclass(frozen=True)
class FailureClass:
    """One way in which an environment breaks.

    Attributes:
        id: Letter of the group and a number, ``"A2"``; never reused.
        title: What is wrong, in a few words.
        cause: Why it happens, in one or two sentences.
        remedies: Ways out, best first.
        texts: Patterns of the messages it shows; see :func:`compiled`. Empty for a silent failure.
        kind: Whether it can be the root cause.
        follows: Classes that, when their text is there too, are the cause of this one.
        here: What becomes of it with halfbyte in the place of bitsandbytes, where that is different.
        sources: Addresses of reports and documents.
        read: Says what the numbers in a matched text mean, or None.
    """

    id: str
    title: str
    cause: str
    remedies: tuple[Remedy, ...]
    texts: tuple[str, ...] = ()
    kind: Kind = "cause"
    follows: tuple[str, ...] = ()
    here: str = ""
    sources: tuple[str, ...] = ()
    read: Callable[[re.Match[str]], Reading | None] | None = None

    @functools.cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """The texts, compiled once."""
        return tuple(compiled(text) for text in self.texts)

    @property
    def silent(self) -> bool:
        """No message shows it; only a check or a measurement can."""
        return not self.texts
