"""The smallest Triton kernel worth the name; in a file of its own because Triton reads its source."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["add"]

BLOCK = 1024


@triton.jit
def _add_vectors_kernel(x_pointer, y_pointer, out_pointer, count, block: tl.constexpr):  # pyright: ignore
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = offsets < count
    total = tl.load(x_pointer + offsets, mask=inside) + tl.load(y_pointer + offsets, mask=inside)
    tl.store(out_pointer + offsets, total, mask=inside)


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x + y``, two vectors of the same length on one GPU."""
    out = torch.full_like(x, float("nan"))
    with torch.get_device_module(x.device).device(x.device):  # Triton launches on the current device
        _add_vectors_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, out, x.numel(), block=BLOCK)  # pyright: ignore
    return out
