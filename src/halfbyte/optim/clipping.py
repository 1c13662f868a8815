"""Gradient clipping by percentile, as bitsandbytes had it up to 0.49: the last 100 gradient norms set the bound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError

__all__ = ["HISTORY", "check_percentile", "percentile_scale"]

HISTORY = 100
"""Squared norms that are kept for each parameter."""


def check_percentile(percentile: int) -> int:
    """``percentile`` itself if it is one; 100 means no clipping.

    Raises:
        ArgumentError: It is not between 1 and 100.
    """
    if not 1 <= percentile <= 100:
        raise ArgumentError(f"percentile_clipping is {percentile!r}", expected="1 to 100, where 100 does not clip")
    return percentile


def percentile_scale(squared: Tensor, history: Tensor, step: Any, percentile: int) -> Tensor:
    """Factor, fp32 scalar on the gradient's device, that brings the gradient to the bound; 1 where it is below.

    The bound is the norm at ``percentile`` of the 100 sorted ones. The first step fills all places of ``history``.

    Args:
        squared: fp32 scalar, the gradient's squared norm.
        history: fp32 ``(100,)`` squared norms, updated in place.
        step: Number of this step, from 1.
        percentile: 1 to 99.
    """
    place = torch.arange(HISTORY, device=history.device)
    history.copy_(torch.where((place == step % HISTORY) | torch.as_tensor(step == 1), squared, history))
    bound, current = history.sort().values[percentile].sqrt(), squared.sqrt()
    return torch.where(current > bound, bound / current, torch.ones_like(current))
