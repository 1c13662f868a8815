"""Products with many activations by slices: some rows (or columns) of the weight are decoded, torch multiplies them."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.backends.cpu import host
from halfbyte.backends.cpu.four_bit import decode
from halfbyte.backends.cpu.weight import Weight
from halfbyte.backends.cpu.workspace import workspace

__all__ = ["compute_dtype", "gradient", "multiply"]

SLICE_BYTES = 16 << 20
"""Dequantized weight worked on at a time: little memory, yet few calls of torch's product (some 50 µs each)."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What slices are multiplied in: bf16 where the CPU has products of bf16; elsewhere fp32 is faster."""
    return dtype if dtype == torch.bfloat16 and host.multiplies_bf16() else torch.float32


def _slice_of(count: int, size: int) -> int:
    """Rows or columns of ``size`` bytes to take at a time: equal slices of at most SLICE_BYTES, a multiple of 64."""
    most = max(1, SLICE_BYTES // size)
    even = -(-count // -(-count // most))
    return min(count, -(-even // 64) * 64)


def multiply(activations: Tensor, weight: Weight, out: Tensor) -> None:
    """``activations @ weight.T + bias`` into ``out``, slice by slice of rows."""
    columns, rows = weight.columns, weight.rows
    dtype = compute_dtype(out.dtype)
    activations, bias = activations.to(dtype), None if weight.bias is None else weight.bias.detach().to(dtype)
    step = _slice_of(rows, columns * dtype.itemsize)
    with torch.no_grad():
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            piece = workspace((stop - start) * columns, dtype)
            _decode(weight, piece, start * columns, stop * columns)
            part = None if bias is None else bias[start:stop]
            out[:, start:stop] = torch.nn.functional.linear(activations, piece.view(-1, columns), part)


def gradient(grad: Tensor, weight: Weight, out: Tensor) -> None:
    """``grad @ weight`` into ``out``, slice by slice of columns."""
    columns, rows = weight.columns, weight.rows
    dtype = compute_dtype(out.dtype)
    grad, step = grad.to(dtype), _slice_of(columns, rows * dtype.itemsize)
    with torch.no_grad():
        for start in range(0, columns, step):
            width = min(columns, start + step) - start
            piece = workspace(rows * width, dtype)
            _decode(weight, piece, start, rows * columns, segment=(width, columns))
            out[:, start : start + width] = torch.matmul(grad, piece.view(rows, width))


def _decode(weight: Weight, piece: Tensor, first: int, end: int, segment: tuple[int, int] | None = None) -> None:
    decode(
        weight.packed,
        weight.scales,
        weight.blocksize,
        weight.table,
        piece,
        first=first,
        end=end,
        segment=segment,
        exact=False,
    )
