"""Products with many experts for many rows: weights are dequantized slice by slice and multiplied by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.backends.triton.dequantize import Nested, dequantize_into
from halfbyte.backends.triton.device import pairs_of

__all__ = ["product", "why_not"]

SLICE_BYTES = 256 << 20
"""Dequantized weights of all experts at a time."""

ALIGNED = 8
"""Elements that rows of torch's grouped operands are a multiple of: 16 bytes."""


def _grouped_mm() -> Callable[..., Tensor] | None:
    return getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def why_not(x: Tensor, n: int, k: int) -> str | None:
    """Why torch cannot multiply these groups; None where it can."""
    if _grouped_mm() is None:
        return "this torch has no grouped product"
    if torch.version.hip is not None or torch.cuda.get_device_capability(x.device) < (9, 0):
        return "torch's grouped product needs a GPU of capability 9.0"
    if x.dtype != torch.bfloat16:
        return f"torch's grouped product takes bfloat16, not {x.dtype}"
    if n % ALIGNED or k % ALIGNED:
        return f"experts of {n}x{k} values are not aligned to 16 bytes"
    return None


def product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: Nested,
    order: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    repeat: int,
    blocksize: int,
    quant_type: str,
    transposed: bool,
) -> None:
    """Fill ``out`` ``(products, N)`` for x ``(rows, K)``; nothing waits for the GPU."""
    count, (products, n), k = ends.numel(), out.shape, x.shape[1]
    multiply: Any = _grouped_mm()
    pairs = pairs_of(quant_type, x.device.index)
    rows = order.long()
    sorted_x = x[rows // repeat]
    slices = -(-count * n * k * x.element_size() // SLICE_BYTES)
    step = -(-n // (slices * ALIGNED)) * ALIGNED
    sorted_out = torch.empty_like(out) if step < n else out
    workspace = torch.empty(count * step * k, dtype=x.dtype, device=x.device)
    for first in range(0, n, step):
        width = min(n, first + step) - first
        weight = workspace[: count * width * k]
        # Of weights stored (K, N) a slice is columns of every row, else whole rows of every expert.
        shape = {"rows": count * k, "cols": n, "first": first} if transposed else {
            "rows": count, "cols": n * k, "first": first * k,
        }  # fmt: skip
        dequantize_into(weight, packed, absmax, nested, blocksize, pairs, **shape, end=count * n * k)
        operand = weight.view(count, k, width) if transposed else weight.view(count, width, k).transpose(1, 2)
        part = multiply(sorted_x, operand, offs=ends)
        if step < n:
            sorted_out[:, first : first + width] = part
        else:
            sorted_out = part
    places = torch.arange(products, device=x.device, dtype=ends.dtype)
    if bias is not None:
        expert = torch.searchsorted(ends, places, right=True).clamp_(max=count - 1)
        sorted_out = sorted_out + bias[expert]
    # torch leaves rows that have no expert as they were.
    out[rows] = sorted_out.masked_fill_((places >= ends[-1]).unsqueeze(1), 0.0)
