"""Adam (Kingma and Ba, arXiv:1412.6980, algorithm 1); with decoupled decay it is AdamW, with a bounded update LAMB."""

from __future__ import annotations

from halfbyte.rules.definition import Value, rule, xp

__all__ = ["adam"]


@rule(signed=(True, False), decay="decoupled")
def adam(g: Value, m: Value, v: Value, h: Value) -> Value:
    """Mean of gradients over the root of the mean of their squares, both freed of their bias towards zero.

    Where the squares are zero there was no gradient and there is no update: bitsandbytes' 8-bit states may hold a zero
    ``v`` beside an ``m`` that is not, and ``m / eps`` would throw the parameter away.
    """
    m = h.beta1 * m + h.rest1 * g
    v = h.beta2 * v + h.rest2 * (g * g)
    update = (m * h.unbias1) / (xp.sqrt(v) * h.unbias2 + h.eps)
    return xp.where(v > 0.0, update, 0.0), m, v
