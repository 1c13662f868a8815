"""The numbers of a step as the tensor that ops take: from Python numbers, or on a device without asking it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.rules import hyper

__all__ = ["hyper_tensor", "least"]


def hyper_tensor(device: torch.device, **settings: Any) -> Tensor:
    """fp32 tensor in the order of :data:`halfbyte.rules.FIELDS`; on the CPU if every setting is a Python number.

    Args:
        device: Where it goes if a setting (step, lr, a scale) is a tensor, computed there in fp64.
        settings: Arguments of :func:`halfbyte.rules.hyper`.
    """
    if not any(isinstance(value, Tensor) for value in settings.values()):
        return torch.tensor(hyper(**settings), dtype=torch.float32, device="cpu")
    exact = {name: _exact(value, device) for name, value in settings.items()}
    values = [_exact(value, device) for value in hyper(**exact)]
    return torch.stack([value if isinstance(value, Tensor) else _filled(value, device) for value in values]).float()


def _exact(value: Any, device: torch.device) -> Any:
    return value.detach().to(device, torch.float64).reshape(()) if isinstance(value, Tensor) else value


def _filled(value: float, device: torch.device) -> Tensor:
    # A fill is a kernel with an immediate: no copy from the host, so it may be captured in a graph.
    return torch.full((), float(value), dtype=torch.float64, device=device)


def least(a: Any, b: Any) -> Any:
    """The smaller of two numbers or scalar tensors.

    >>> least(2.0, 1.0)
    1.0
    """
    if isinstance(a, Tensor):
        return torch.clamp(a, max=float(b))
    return min(a, b)
