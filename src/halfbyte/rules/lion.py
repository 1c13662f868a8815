"""Lion (Chen et al., arXiv:2302.06675, algorithm 2): the sign of a mean."""

from __future__ import annotations

from halfbyte.rules.definition import Value, rule, xp

__all__ = ["lion"]


@rule(signed=(True,), decay="decoupled")
def lion(g: Value, m: Value, h: Value) -> Value:
    """Looks with ``beta1``, remembers with ``beta2``; no gradient and no memory give no update."""
    mix = h.beta1 * m + h.rest1 * g
    m = h.beta2 * m + h.rest2 * g
    return xp.where(mix > 0.0, 1.0, xp.where(mix < 0.0, -1.0, 0.0)), m
