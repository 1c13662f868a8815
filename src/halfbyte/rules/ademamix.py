"""AdEMAMix (Pagliardini, Ablin and Grangier, arXiv:2409.03137, algorithm 1): Adam with a second, slow mean."""

from __future__ import annotations

from halfbyte.rules.definition import Value, rule, xp

__all__ = ["ademamix"]


@rule(signed=(True, True, False), decay="decoupled")
def ademamix(g: Value, fast: Value, slow: Value, v: Value, h: Value) -> Value:
    """The fast mean is freed of its bias, the slow one is not; ``alpha`` weighs it. No squares, no update: see Adam."""
    fast = h.beta1 * fast + h.rest1 * g
    slow = h.beta3 * slow + h.rest3 * g
    v = h.beta2 * v + h.rest2 * (g * g)
    update = (fast * h.unbias1 + h.alpha * slow) / (xp.sqrt(v) * h.unbias2 + h.eps)
    return xp.where(v > 0.0, update, 0.0), fast, slow, v
