"""Adam (Kingma and Ba, arXiv:1412.6980, algorithm 1); with decoupled decay it is AdamW, with a bounded update LAMB."""

from __future__ import annotations

from halfbyte.rules.definition import Value, rule, xp

__all__ = ["adam"]


@rule(signed=(True, False), decay="decoupled")
def adam(g: Value, m: Value, v: Value, h: Value) -> Value:
    """Mean of gradients over the root of the mean of their squares, both freed of their bias towards zero."""
    m = h.beta1 * m + h.rest1 * g
    v = h.beta2 * v + h.rest2 * (g * g)
    return (m / h.correction1) / (xp.sqrt(v) / h.correction2 + h.eps), m, v
