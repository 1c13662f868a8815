"""Large products: the weight is dequantized slice by slice, into memory that every slice uses again, for torch's
matmul.

The slice comes from torch's caching allocator, which is a workspace per device and stream already: the same memory in
every call, safe under CUDA-graph capture, and back at once for anyone else's use. Slices that fit the level-2 cache
were
slower on an H100 than the largest allowed ones (1.2 to 1.4 times a bf16 matmul against 1.15 for 2048 rows): their
matmuls
fill the multiprocessors less evenly, which costs more than the memory traffic that they save.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.backends.triton.dequantize import Nested, dequantize_into, whole_filling
from halfbyte.backends.triton.device import pairs_of
from halfbyte.backends.triton.launch import allocation, on_its_device

__all__ = ["backward", "forward", "repeated", "slice_rows"]

TILE = 128
"""Edge of a matmul tile: slices are whole tiles."""

SLICE_BYTES = 128 << 20
"""Size of a slice at most: a whole projection of an 8B model, a quarter of one of a 70B model."""


def slice_rows(rows: int, row_bytes: int, step: int) -> int:
    """How many of ``rows`` weight rows of ``row_bytes`` dequantized bytes to take at once: equal parts, as few as fit.

    Always a multiple of ``step`` and of :data:`TILE`, unless it is all rows.

    >>> slice_rows(14336, 8192, 1), slice_rows(28672, 16384, 1)
    (14336, 7168)
    """
    count = -(-rows * row_bytes // SLICE_BYTES)
    if count <= 1:
        return rows
    step = math.lcm(step, TILE)
    return min(rows, -(-rows // (count * step)) * step)


def forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: Nested,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """``out = x @ weight.T + bias`` for x ``(M, K)`` and contiguous out ``(M, N)``."""
    k, n = x.shape[1], out.shape[1]
    pairs = pairs_of(quant_type, x.device.index)
    # Slices must begin on a whole 8 codes.
    step = 8 // math.gcd(k, 8)
    count = slice_rows(n, k * x.element_size(), step)
    workspace = torch.empty((count, k), dtype=x.dtype, device=x.device)
    for start in range(0, n, count):
        stop = min(n, start + count)
        weight = workspace[: stop - start]
        dequantize_into(
            weight, packed, absmax, nested, blocksize, pairs, rows=1, cols=n * k, first=start * k, end=n * k
        )
        part = out[:, start:stop]
        if bias is None:
            torch.mm(x, weight.t(), out=part)
        else:
            torch.addmm(bias[start:stop], x, weight.t(), out=part)


def backward(
    grad: Tensor, packed: Tensor, absmax: Tensor, nested: Nested, blocksize: int, quant_type: str, out: Tensor
) -> None:
    """``out = grad @ weight`` for grad ``(M, N)`` and contiguous out ``(M, K)``: slices are columns of the weight."""
    n, k = grad.shape[1], out.shape[1]
    pairs = pairs_of(quant_type, grad.device.index)
    count = slice_rows(k, n * grad.element_size(), 8) if k % 8 == 0 else k
    workspace = torch.empty(n * count, dtype=grad.dtype, device=grad.device)
    for start in range(0, k, count):
        stop = min(k, start + count)
        weight = workspace[: n * (stop - start)].view(n, stop - start)
        if count == k:
            dequantize_into(weight, packed, absmax, nested, blocksize, pairs, rows=1, cols=n * k, end=n * k)
        else:
            dequantize_into(weight, packed, absmax, nested, blocksize, pairs, rows=n, cols=k, first=start, end=n * k)
        torch.mm(grad, weight, out=out[:, start:stop])


def repeated(
    packed: Tensor,
    absmax: Tensor,
    nested: Nested,
    blocksize: int,
    quant_type: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    bias: Tensor | None = None,
    *,
    across: bool,
) -> Callable[[Tensor], Tensor] | None:
    """The product of contiguous activations with these tensors as they lie; None where a weight takes several slices.

    Two launches and two tensors of torch's: in a training step the host's work for each of them counts.

    Args:
        packed: Contiguous, aligned, like the scales and the bias.
        absmax: As ops take it.
        nested: As ops take them, readable.
        blocksize: Values per block.
        quant_type: ``"nf4"`` or ``"fp4"``.
        shape: (N, K) of the weight.
        dtype: Of the activations.
        bias: ``(N,)``.
        across: ``grad @ weight`` instead of ``x @ weight.T + bias``.
    """
    n, k = shape
    fill = whole_filling(packed, absmax, nested, blocksize, quant_type, n * k, dtype)
    if fill is None or n * k * dtype.itemsize > SLICE_BYTES:
        return None

    empty = allocation(shape, dtype)

    def forward(x: Tensor) -> Tensor:
        weight = empty(x)
        fill(weight.data_ptr())
        return F.linear(x, weight, bias)

    def backward(grad: Tensor) -> Tensor:
        weight = empty(grad)
        fill(weight.data_ptr())
        return torch.matmul(grad, weight)

    return on_its_device(backward if across else forward, packed.device.index)
