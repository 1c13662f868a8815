"""Registration of facts and checks: a function's parameters name the facts it needs; its docstring documents it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from halfbyte.doctor.model import Layer, Level, Result
from halfbyte.errors import ArgumentError

__all__ = ["Check", "FactRule", "check", "checks", "closure", "fact", "facts", "select"]

F = TypeVar("F", bound=Callable[..., Any])

HEADINGS = ("What it means", "Why it matters", "How to fix")
"""Parts of a check's docstring; each starts a paragraph of its documentation page."""


@dataclass(frozen=True)
class FactRule:
    """How one fact is gathered. ``slow`` ones start a child process; they are gathered side by side."""

    name: str
    function: Callable[..., Any]
    wants: tuple[str, ...]
    slow: bool


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        code: Stable name, layer and number: ``"GPU103"``.
        function: Takes facts, returns a result.
        wants: Names of those facts.
        requires: Codes that must hold first; while one fails this is "not reached".
        classes: Failure classes it detects.
        proof: Code of the check that tries what this one reads. Where it passes, a failure here is a warning; where it
            fails as well, this one is the cause.
        steps: Steps of the proofs whose outcome it looks at; others need not run for it.
        asked_level: The lowest level that runs it, as registered; see :attr:`level`.
    """

    code: str
    function: Callable[..., Result]
    wants: tuple[str, ...]
    requires: tuple[str, ...]
    classes: tuple[str, ...]
    proof: str
    steps: tuple[str, ...]
    asked_level: Level

    @property
    def level(self) -> Level:
        """The lowest level that runs it: never quick where a fact starts a child process."""
        slow = any(_facts[name].slow for name in closure(self.wants))
        return Level.DEFAULT if slow and self.asked_level is Level.QUICK else self.asked_level

    @property
    def layer(self) -> Layer:
        """Section of the report, from the code's letters."""
        return Layer(self.code.rstrip("0123456789"))

    @property
    def title(self) -> str:
        """What holds when the check passes: the docstring's first line."""
        return inspect.cleandoc(self.function.__doc__ or "").split("\n", 1)[0].rstrip(".")

    @property
    def sections(self) -> dict[str, str]:
        """The docstring's parts by heading."""
        text = inspect.cleandoc(self.function.__doc__ or "")
        pieces = re.split(rf"^({'|'.join(HEADINGS)}):\s*", text, flags=re.MULTILINE)[1:]
        return {heading: " ".join(body.split()) for heading, body in zip(pieces[::2], pieces[1::2], strict=True)}


_facts: dict[str, FactRule] = {}
_checks: dict[str, Check] = {}


def fact(function: Callable[..., Any] | None = None, *, slow: bool = False) -> Any:
    """Register a fact under its function's name; the parameters name the facts (or ``host``) it is made from."""

    def decorate(target: Callable[..., Any]) -> Callable[..., Any]:
        name = target.__name__
        if name in _facts:
            raise ArgumentError(f"a fact named {name!r} is registered already")
        _facts[name] = FactRule(name, target, tuple(inspect.signature(target).parameters), slow)
        return target

    return decorate if function is None else decorate(function)


def check(
    code: str,
    *,
    requires: tuple[str, ...] = (),
    classes: tuple[str, ...] = (),
    proof: str = "",
    steps: tuple[str, ...] = (),
    level: Level = Level.QUICK,
) -> Callable[[F], F]:
    """Register a check under a stable code. See :class:`Check` for the arguments.

    Raises:
        ArgumentError: The code is taken, belongs to no layer, or the docstring lacks a part.
    """

    def decorate(function: F) -> F:
        if code in _checks:
            raise ArgumentError(f"a check with code {code!r} is registered already")
        made = Check(
            code, function, tuple(inspect.signature(function).parameters), requires, classes, proof, steps, level
        )
        if tuple(made.sections) != HEADINGS or not made.layer:
            raise ArgumentError(f"docstring of check {code}", expected=f"the parts {', '.join(HEADINGS)}")
        _checks[code] = made
        return function

    return decorate


def facts() -> Mapping[str, FactRule]:
    """All facts by name."""
    return _facts


def checks() -> tuple[Check, ...]:
    """All checks, lowest layer first, then by code."""
    order = list(Layer)
    return tuple(sorted(_checks.values(), key=lambda made: (order.index(made.layer), made.code)))


def select(level: Level, only: Iterable[str] = ()) -> tuple[tuple[Check, ...], frozenset[str]]:
    """Checks to run, in order, and the codes asked for.

    Args:
        level: How deep to go; codes named in ``only`` run at any level.
        only: Codes or prefixes (``"GPU"``). What they require runs too.

    Raises:
        ArgumentError: A code matches nothing.
    """
    every = checks()
    wanted = {made.code for made in every if level.includes(made.level)}
    prefixes = tuple(word.upper() for word in only)
    if prefixes:
        unknown = [word for word in prefixes if not any(made.code.startswith(word) for made in every)]
        if unknown:
            raise ArgumentError(f"no check is called {unknown[0]!r}", hint="halfbyte doctor --list")
        wanted = {made.code for made in every if made.code.startswith(prefixes)}
    needed = set(wanted)
    queue = list(wanted)
    while queue:
        for code in _checks[queue.pop()].requires:
            if code not in needed:
                needed.add(code)
                queue.append(code)
    return tuple(made for made in every if made.code in needed), frozenset(wanted)


def closure(names: Iterable[str]) -> set[str]:
    """The named facts and all that they are made from, without ``host``."""
    found: set[str] = set()
    queue = [name for name in names if name != "host"]
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue.extend(part for part in _facts[name].wants if part != "host")
    return found
