"""8-bit blockwise ops in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.backends.reference import coding
from halfbyte.backends.registry import implements
from halfbyte.formats import blocks

__all__ = ["dequantize_blockwise", "quantize_blockwise"]


@implements("reference", "quantize_blockwise")
def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """uint8 index of the nearest value of ``code`` (ties go down), of A's shape, and fp32 absmax ``(blocks,)``."""
    flat = A.reshape(-1)
    numel = flat.numel()
    codes = torch.empty(numel, dtype=torch.uint8, device=A.device)
    absmax = torch.empty(blocks.block_count(numel, blocksize), dtype=torch.float32, device=A.device)
    midpoints = coding.midpoints_of(code.view(-1))
    for start, stop in coding.pieces(numel, blocksize):
        scaled, scales = coding.scale_blocks(flat[start:stop].float(), blocksize)
        first = start // blocksize
        absmax[first : first + scales.numel()] = scales
        codes[start:stop] = coding.encode(scaled, midpoints)
    return codes.view(A.shape), absmax


@implements("reference", "quantize_blockwise.out")
def quantize_blockwise_out(A: Tensor, code: Tensor, blocksize: int, *, out: Tensor, absmax: Tensor) -> None:
    """:func:`quantize_blockwise` into ``out`` and ``absmax``."""
    codes, scales = quantize_blockwise(A, code, blocksize)
    out.copy_(codes)
    absmax.copy_(scales)


@implements("reference", "dequantize_blockwise")
def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """``code[A] * absmax`` in fp32, rounded once to ``dtype``, of A's shape."""
    flat = A.reshape(-1)
    out = torch.empty(flat.numel(), dtype=dtype, device=A.device)
    table = code.view(-1)
    for start, stop in coding.pieces(flat.numel(), blocksize):
        values = torch.index_select(table, 0, flat[start:stop].int())
        scales = absmax[start // blocksize : blocks.block_count(stop, blocksize)]
        out[start:stop] = values * coding.spread(scales, blocksize, stop - start)
    return out.view(A.shape)


@implements("reference", "dequantize_blockwise.out")
def dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, *, out: Tensor
) -> None:
    """:func:`dequantize_blockwise` into ``out``."""
    out.copy_(dequantize_blockwise(A, absmax, code, blocksize, dtype))
