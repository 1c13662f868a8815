"""RMSprop (Hinton's lecture 6e, 2012): the gradient over the root of the mean of its squares."""

from __future__ import annotations

from halfbyte.rules.definition import Value, rule, xp

__all__ = ["rmsprop"]


@rule(signed=(True,), decay="coupled")
def rmsprop(g: Value, v: Value, h: Value) -> Value:
    """``beta1`` is the smoothing constant that torch calls alpha. 8-bit states use bitsandbytes' signed map."""
    v = h.beta1 * v + h.rest1 * (g * g)
    return g / (xp.sqrt(v) + h.eps), v
