"""Adagrad (Duchi, Hazan and Singer 2011, JMLR 12): the gradient over the root of the sum of its squares."""

from __future__ import annotations

from halfbyte.rules.definition import Value, rule, xp

__all__ = ["adagrad"]


@rule(signed=(True,), decay="coupled")
def adagrad(g: Value, v: Value, h: Value) -> Value:
    """8-bit states use bitsandbytes' signed map, though they are never negative."""
    v = v + g * g
    return g / (xp.sqrt(v) + h.eps), v
