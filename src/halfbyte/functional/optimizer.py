"""Optimizer steps on bare tensors, under bitsandbytes.functional's names."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import backends as _backends  # defines and binds the ops
from halfbyte.errors import ArgumentError
from halfbyte.formats import blocks
from halfbyte.rules import FIELDS, Rule, hyper, rule_named

__all__ = ["bounded", "optimizer_update_8bit_blockwise", "optimizer_update_32bit"]

_ops = torch.ops.halfbyte
del _backends

_BLOCKSIZES = (256, 2048)


def _hyper(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _required(tensor: Tensor | None, name: str, optimizer_name: str) -> Tensor:
    if tensor is None:
        raise ArgumentError(f"{optimizer_name} without {name}", expected="a tensor")
    return tensor


def _states(optimizer_name: str, first: Tensor, second: Tensor | None, what: str) -> list[Tensor]:
    """``state1`` of a rule with three states is two stacked ones."""
    count = len(rule_named(optimizer_name).signed)
    found = [first[0], first[1]] if count == 3 else [first]
    if count > 1:
        found.append(_required(second, f"{what}2", optimizer_name))
    return found


def bounded(length: Tensor, size: Tensor, max_unorm: float, eps: float, rule: Rule) -> Tensor:
    """Factor that brings an update to ``max_unorm`` times the parameter's length; 1 where it is shorter.

    Args:
        length: fp32 scalar, the update's norm.
        size: fp32 scalar, the parameter's.
        max_unorm: The share.
        eps: Added to the bound of rules with one state, as in bitsandbytes.
        rule: The algorithm.

    >>> from halfbyte.rules import rule_named
    >>> bounded(torch.tensor(4.0), torch.tensor(10.0), 0.2, 0.0, rule_named("lamb"))
    tensor(0.5000)
    """
    bound = max_unorm * size + (eps if len(rule.signed) == 1 else 0.0)
    # A parameter of zeros has no length to be measured by: it moves freely, or it never would.
    return torch.where((length > bound) & (size > 0), bound / length, torch.ones_like(length))


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """Step ``p`` and its fp32 states in place. bitsandbytes up to 0.43 lacked ``beta3`` and ``alpha``.

    Args:
        optimizer_name: A rule's name: ``"adam"``, ``"lion"``, ...
        g: Gradient; fp32, bf16 or fp16, not necessarily the parameter's dtype.
        p: Parameter.
        state1: fp32, of ``p``'s shape; ``(2, *p.shape)`` for AdEMAMix.
        beta1: First decay rate.
        eps: Keeps the division finite.
        step: Number of this step, from 1.
        lr: Learning rate.
        state2: fp32, for rules with two states.
        beta2: Second decay rate.
        beta3: Third decay rate (AdEMAMix).
        alpha: Weight of the slow mean (AdEMAMix).
        weight_decay: Coupled or decoupled, as the rule has it.
        gnorm_scale: Factor of the gradient.
        unorm_vec: Gets the update's squared norm where ``max_unorm`` is not 0.
        max_unorm: Bound of the update's norm relative to the parameter's.
        skip_zeros: Leave values alone whose gradient is exactly zero.

    >>> p, m = torch.ones(2), torch.zeros(2)
    >>> optimizer_update_32bit("lion", torch.tensor([1.0, -2.0]), p, m, 0.9, 0.0, 1, 0.5, beta2=0.99)
    >>> p
    tensor([0.5000, 1.5000])
    """
    states = _states(optimizer_name, state1, state2, "state")
    numbers = _hyper(
        hyper(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            beta3=beta3,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            step=step,
            grad_scale=gnorm_scale,
        )
    )
    name = rule_named(optimizer_name).name
    with torch.no_grad():
        if max_unorm > 0.0:
            squared = _ops.optimizer_update_norm([p], [g], states, numbers, name, skip_zeros)
            if unorm_vec is not None:
                unorm_vec.copy_(squared.view(unorm_vec.shape))
            length, size = squared.sqrt()[0], p.detach().float().norm()
            numbers = numbers.to(p.device)
            numbers[FIELDS.index("update_scale")] = bounded(length, size, max_unorm, eps, rule_named(optimizer_name))
        _ops.optimizer_step_32bit([p], [g], states, numbers, name, skip_zeros)


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """Step ``p`` and its 8-bit states in place. bitsandbytes up to 0.43 lacked ``beta3`` and ``alpha``.

    Args:
        optimizer_name: A rule's name: ``"adam"``, ``"lion"``, ...
        g: Gradient; fp32, bf16 or fp16, not necessarily the parameter's dtype.
        p: Parameter.
        state1: uint8 codes of ``qmap1``, of ``p``'s shape; ``(2, *p.shape)`` for AdEMAMix.
        state2: uint8 codes of ``qmap2``, for rules with two states, else None.
        beta1: First decay rate.
        beta2: Second decay rate.
        beta3: Third decay rate (AdEMAMix).
        alpha: Weight of the slow mean (AdEMAMix).
        eps: Keeps the division finite.
        step: Number of this step, from 1.
        lr: Learning rate.
        qmap1: fp32 ``(256,)``, rising.
        qmap2: The same for ``state2``.
        absmax1: fp32, one for each 256 values (or each 2048); ``(2, blocks)`` for AdEMAMix.
        absmax2: The same for ``state2``.
        weight_decay: Coupled or decoupled, as the rule has it.
        gnorm_scale: Factor of the gradient.
        skip_zeros: Leave values alone whose gradient is exactly zero.

    Raises:
        ArgumentError: A state of a rule with two is missing, or the number of scales fits no block size.
    """
    states = _states(optimizer_name, state1, state2, "state")
    absmax = _states(optimizer_name, absmax1, absmax2, "absmax")
    maps = [qmap1] * (len(states) - 1 if len(states) > 1 else 1)
    if len(states) > 1:
        maps.append(_required(qmap2, "qmap2", optimizer_name))
    fitting = [size for size in _BLOCKSIZES if blocks.block_count(p.numel(), size) == absmax[0].numel()]
    if not fitting:
        raise ArgumentError(
            f"{absmax[0].numel()} scales for {p.numel()} values", expected="one for each 256 or each 2048"
        )
    numbers = _hyper(
        hyper(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            beta3=beta3,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            step=step,
            grad_scale=gnorm_scale,
        )
    )
    with torch.no_grad():
        _ops.optimizer_step_8bit(
            [p], [g], states, absmax, maps, numbers, fitting[0], rule_named(optimizer_name).name, skip_zeros
        )
