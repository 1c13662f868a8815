"""ADOPT (Taniguchi et al., arXiv:2411.02853, algorithm 2): Adam that divides by the last step's second moment."""

from __future__ import annotations

from halfbyte.rules.definition import Value, rule, xp

__all__ = ["adopt"]


@rule(signed=(True, False), decay="decoupled")
def adopt(g: Value, m: Value, v: Value, h: Value) -> Value:
    """The first step only sets ``v``; later gradients are clipped to the fourth root of the number of steps before."""
    first = h.step < 1.5
    bound = xp.sqrt(xp.sqrt(xp.maximum(h.step - 1.0, 0.0)))
    normed = g / xp.maximum(xp.sqrt(v), h.eps)
    normed = xp.minimum(xp.maximum(normed, 0.0 - bound), bound)
    m = xp.where(first, m, h.beta1 * m + h.rest1 * normed)
    v = xp.where(first, g * g, h.beta2 * v + h.rest2 * (g * g))
    return xp.where(first, 0.0, m), m, v
