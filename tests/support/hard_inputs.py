"""Tensors that break careless kernels, by name: every backend's tests draw from the same list."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["DTYPES", "HARD", "LENGTHS", "hard", "weights"]

LENGTHS = (0, 1, 2, 63, 64, 65, 127, 4097)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal values whose scale changes from 64 to 64, as rows of a model's weight do."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(numel // 64 + 1, generator=generator).mul(3).exp().repeat_interleave(64)[:numel]
    return (torch.randn(numel, generator=generator) * scale * 0.02).to(dtype)


def _with(value: float, dtype: torch.dtype) -> torch.Tensor:
    mixed = weights(200, dtype, seed=1)
    mixed[70] = value
    return mixed


HARD: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "zeros": lambda dtype: torch.zeros(150, dtype=dtype),
    "a zero block between others": lambda dtype: torch.cat(
        [weights(64, dtype), torch.zeros(64, dtype=dtype), weights(40, dtype)]
    ),
    "minus zero": lambda dtype: torch.tensor([-0.0, 1.0, 0.0], dtype=dtype),
    "one value": lambda dtype: torch.full((130,), -3.0, dtype=dtype),
    "smallest subnormals": lambda dtype: torch.tensor(
        [torch.finfo(dtype).smallest_normal * f for f in (2**-6, -(2**-6), 2**-5, 0.5, -1.0)], dtype=dtype
    ),
    "nothing but subnormals": lambda dtype: (
        torch.linspace(-1, 1, 77).mul(torch.finfo(dtype).smallest_normal / 8).to(dtype)
    ),
    "smallest normals": lambda dtype: weights(100, torch.float32).mul(torch.finfo(dtype).tiny * 64).to(dtype),
    "largest values": lambda dtype: (weights(100).sign() * torch.linspace(0.1, 1, 100) * torch.finfo(dtype).max).to(
        dtype
    ),
    "one outlier": lambda dtype: _with(1e4, dtype),
    "all signs and sizes": lambda dtype: (
        torch.logspace(-4, 4, 300).mul(torch.tensor([1.0, -1.0]).repeat(150)).to(dtype)
    ),
}


def hard(name: str, dtype: torch.dtype) -> torch.Tensor:
    """The tensor of that name; finite."""
    made = HARD[name](dtype)
    assert made.isfinite().all(), name
    return made
