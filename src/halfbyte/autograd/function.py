"""What the autograd Functions of this package have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["bias_gradient", "direct_apply"]


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What ``function.apply`` calls in the end, without the search for transforms of torch.func before it.

    The search takes longer than all else in a short step. The caller makes sure that no transform is at work.
    """
    return super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient to a bias ``(N,)`` of that dtype from the one to its sum, ``(..., N)``."""
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=dtype)
