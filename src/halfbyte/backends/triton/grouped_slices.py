"""Products with many experts for many rows: weights are dequantized slice by slice and multiplied by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from halfbyte.backends.triton.dequantize import Nested, dequantize_into
from halfbyte.backends.triton.device import pairs_of
from halfbyte.backends.triton.kernels.grouped import _place_rows_kernel
from halfbyte.backends.triton.launch import start

__all__ = ["product", "why_not"]

SLICE_BYTES = 256 << 20
"""Dequantized weights of all experts at a time."""

COLUMNS = 1024
"""Columns that one program puts in their place."""

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
    sorted_x = x[order // repeat]
    slices = -(-count * n * k * x.element_size() // SLICE_BYTES)
    step = -(-n // (slices * ALIGNED)) * ALIGNED
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
        # torch leaves rows that have no expert as they were.
        start(
            _place_rows_kernel, (products, -(-width // COLUMNS)), part, order, ends, bias, out,
            count, width, part.stride(0), n, first, triton.next_power_of_2(count), COLUMNS, bias is not None,
            num_warps=4,
        )  # fmt: skip
