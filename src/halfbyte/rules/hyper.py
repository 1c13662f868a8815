"""The numbers that a rule gets beside gradient and states: their names, order and how they follow from the settings."""

from __future__ import annotations

from typing import Any

from halfbyte.errors import ArgumentError

__all__ = ["FIELDS", "hyper"]

FIELDS = (
    "lr",
    "beta1",
    "rest1",
    "beta2",
    "rest2",
    "beta3",
    "rest3",
    "alpha",
    "eps",
    "weight_decay",
    "step",
    "unbias1",
    "unbias2",
    "grad_scale",
    "update_scale",
)
"""Order in which ops take them, as one fp32 tensor.

``rest1`` is ``1 - beta1``, rounded once instead of computed from a rounded beta (0.999 in fp32 would put 1.3e-5 on it).
``unbias1`` is ``1 / (1 - beta1**step)``, ``unbias2`` one over the root of ``1 - beta2**step``. The gradient is
multiplied by ``grad_scale`` first (clipping), the update by ``update_scale`` last (LARS and LAMB)."""


def hyper(
    *,
    lr: Any,
    beta1: float,
    beta2: float,
    eps: float,
    step: Any,
    beta3: Any = 0.0,
    alpha: Any = 0.0,
    weight_decay: float = 0.0,
    grad_scale: Any = 1.0,
    update_scale: Any = 1.0,
    bias_correction: bool = True,
) -> list[Any]:
    """Values in the order of :data:`FIELDS`; numbers or, where the caller keeps some on a device, scalar tensors.

    Raises:
        ArgumentError: ``step`` is below 1.

    >>> dict(zip(FIELDS, hyper(lr=0.1, beta1=0.9, beta2=0.75, eps=1e-8, step=1)))["unbias2"]
    2.0
    """
    if isinstance(step, int) and step < 1:
        raise ArgumentError(f"step is {step}", expected="1 for the first step")
    return [
        lr,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        beta3,
        1.0 - beta3,
        alpha,
        eps,
        weight_decay,
        step,
        1.0 / (1.0 - beta1**step) if bias_correction else 1.0,
        (1.0 - beta2**step) ** -0.5 if bias_correction else 1.0,
        grad_scale,
        update_scale,
    ]
