"""Stochastic gradient descent with momentum as torch has it, plain and after Nesterov; with a bounded update LARS."""

from __future__ import annotations

from halfbyte.rules.definition import Value, rule, xp

__all__ = ["momentum", "nesterov"]


@rule(signed=(True,), decay="coupled")
def momentum(g: Value, m: Value, h: Value) -> Value:
    """The first step takes the gradient as it is; later ones add ``1 - dampening`` (``beta2``) of it."""
    m = xp.where(h.step < 1.5, g, h.beta1 * m + h.rest2 * g)
    return m, m


@rule(signed=(True,), decay="coupled")
def nesterov(g: Value, m: Value, h: Value) -> Value:
    """Sutskever et al. 2013 in torch's form: one more look ahead along the new momentum."""
    m = xp.where(h.step < 1.5, g, h.beta1 * m + h.rest2 * g)
    return g + h.beta1 * m, m
