"""What a rule is, how it is registered by name, and how it is bound to a backend's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal, Protocol, cast

from halfbyte.errors import ArgumentError

__all__ = ["ALIASES", "Namespace", "Rule", "Value", "bind", "rule", "rule_named", "rule_names", "xp"]

Value = Any
"""A number of whatever kind the backend computes with: a tensor, a vector register, a Triton block."""


class Namespace(Protocol):
    """The functions that a rule may use beside ``+ - * /``, ``<`` and ``>``."""

    def sqrt(self, x: Value) -> Value:
        """Square root, correctly rounded."""
        ...

    def where(self, condition: Value, yes: Value, no: Value) -> Value:
        """``yes`` where the condition holds, else ``no``."""
        ...

    def maximum(self, x: Value, y: Value) -> Value:
        """The larger of two."""
        ...

    def minimum(self, x: Value, y: Value) -> Value:
        """The smaller of two."""
        ...


xp = cast(Namespace, None)
"""Stands where a backend puts its own namespace (:func:`bind`)."""


@dataclass(frozen=True)
class Rule:
    """One algorithm.

    Attributes:
        name: What ops and ``optimizer_name`` call it.
        function: ``(g, *states, h) -> (update, *states)`` on fp32 values. The parameter then becomes
            ``p - h.lr * update``. ``g`` is the gradient, ``h`` the numbers of :data:`halfbyte.rules.hyper.FIELDS`.
        signed: For each state, whether it can be negative where it may be stored in 8 bits: picks the code map.
        decay: Where weight decay goes: ``decoupled`` shrinks the parameter by ``lr * weight_decay`` of itself before
            the update (Loshchilov and Hutter, arXiv:1711.05101), ``coupled`` adds ``weight_decay * p`` to the gradient.
    """

    name: str
    function: Callable[..., Any]
    signed: tuple[bool, ...]
    decay: Literal["coupled", "decoupled"]


_RULES: dict[str, Rule] = {}

ALIASES = {"lars": "momentum", "lamb": "adam"}
"""Algorithms that are another one with a bound on the length of the update."""


def rule(
    *, signed: tuple[bool, ...], decay: Literal["coupled", "decoupled"]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the rule of its name; see :class:`Rule`.

    Raises:
        ArgumentError: The name is taken.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        if name in _RULES:
            raise ArgumentError(f"a rule named {name!r} is registered already", hint="choose another name")
        _RULES[name] = Rule(name, function, signed, decay)
        return function

    return decorate


def rule_named(name: str) -> Rule:
    """The rule of that name, or of the algorithm that it is an alias of.

    Raises:
        ArgumentError: No such rule.

    >>> rule_named("lamb").name, rule_named("lion").decay
    ('adam', 'decoupled')
    """
    found = _RULES.get(ALIASES.get(name, name))
    if found is None:
        known = ", ".join(sorted({*_RULES, *ALIASES}))
        raise ArgumentError(f"optimizer {name!r} is unknown", expected=f"one of {known}")
    return found


def rule_names() -> tuple[str, ...]:
    """Names of the registered rules, sorted.

    >>> "adam" in rule_names()
    True
    """
    return tuple(sorted(_RULES))


def bind(function: Callable[..., Any], namespace: Any) -> Callable[..., Any]:
    """The same code with ``xp`` meaning ``namespace``; it sees no other global.

    >>> import math
    >>> def root(x): return xp.sqrt(x)
    >>> bind(root, math)(9.0)
    3.0
    """
    code = cast(FunctionType, function).__code__
    # What a rule calls may import, and C code does so by the caller's builtins.
    names = {"xp": namespace, "__builtins__": {"__import__": __import__}, "__name__": function.__module__}
    bound = FunctionType(code, names, function.__name__)
    bound.__doc__, bound.__module__ = function.__doc__, function.__module__
    return bound
