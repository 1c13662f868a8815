"""4-bit ops in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.backends.reference import coding
from halfbyte.backends.registry import implements
from halfbyte.formats import blocks, packing
from halfbyte.formats.codebook import codebook

__all__ = ["decode_absmax", "dequantize_4bit", "quantize_4bit"]

BITS = 4


@implements("reference", "quantize_4bit")
def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed codes ``(bytes / itemsize, 1)`` and fp32 absmax ``(blocks,)`` of ``A`` in row-major order."""
    book = codebook(quant_type)
    flat = A.reshape(-1)
    numel = flat.numel()
    packed = torch.empty(blocks.packed_bytes(numel, BITS), dtype=torch.uint8, device=A.device)
    absmax = torch.empty(blocks.block_count(numel, blocksize), dtype=torch.float32, device=A.device)
    for start, stop in coding.pieces(numel, blocksize):
        scaled, scales = coding.scale_blocks(flat[start:stop].float(), blocksize)
        absmax[start // blocksize : start // blocksize + scales.numel()] = scales
        codes = coding.encode_book(scaled, book)
        short = -codes.numel() % packing.GROUP
        codes = torch.nn.functional.pad(codes, (0, short), value=book.zero_code).view(-1, packing.GROUP)
        stream = torch.stack(packing.pack(codes, BITS), dim=1).view(-1)
        first = start * BITS // 8
        end = min(packed.numel(), first + stream.numel())
        packed[first:end] = stream[: end - first]
    return packed.view(quant_storage).view(-1, 1), absmax


def decode_absmax(
    absmax: Tensor,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
    only: Tensor | None = None,
) -> Tensor:
    """fp32 absmax of every block, or of those numbered ``only``: ``absmax`` itself, or the double-quantized decoded."""
    if absmax_8bit is None or absmax_code is None or absmax_offset is None:
        return absmax if only is None else absmax[only]
    codes = absmax_8bit.view(-1)
    if only is None:
        scales = coding.spread(absmax, blocks.NESTED_BLOCKSIZE, codes.numel())
    else:
        codes, scales = codes[only], absmax[only // blocks.NESTED_BLOCKSIZE]
    return absmax_code[codes.int()] * scales + absmax_offset.float()


def _decode(packed: Tensor, absmax: Tensor, blocksize: int, table: Tensor, out: Tensor) -> Tensor:
    """Fill flat ``out`` with the values of ``packed``, rounded once from fp32."""
    stream = packed.contiguous().view(-1).view(torch.uint8)
    byte = torch.arange(256, device=table.device)
    pairs = torch.stack([table[byte >> BITS], table[byte & 15]], dim=1)
    numel = out.numel()
    for start, stop in coding.pieces(numel, blocksize):
        codes = stream[start * BITS // 8 : blocks.packed_bytes(stop, BITS)].int()
        values = torch.index_select(pairs, 0, codes).view(-1)[: stop - start]
        scales = absmax[start // blocksize : blocks.block_count(stop, blocksize)]
        out[start:stop] = values * coding.spread(scales, blocksize, stop - start)
    return out


@implements("reference", "dequantize_4bit")
def dequantize_4bit(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """``levels[code] * absmax`` in fp32, rounded once to ``dtype``, of ``shape``."""
    scales = decode_absmax(absmax, absmax_8bit, absmax_code, absmax_offset)
    out = torch.empty(math.prod(shape), dtype=dtype, device=A.device)
    return _decode(A, scales, blocksize, coding.table_of(quant_type, A.device), out).view(tuple(shape))


@implements("reference", "dequantize_4bit.out")
def dequantize_4bit_out(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    *,
    out: Tensor,
) -> None:
    """:func:`dequantize_4bit` into ``out``."""
    out.copy_(dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype, absmax_8bit, absmax_code, absmax_offset))


@implements("reference", "gemm_4bit")
def gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """``A @ weight.T + bias`` with the weight dequantized to A's dtype."""
    nested = (absmax_8bit, absmax_code, absmax_offset)
    weight = dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, A.dtype, *nested)
    return torch.nn.functional.linear(A, weight, bias)


@implements("reference", "gemm_4bit_dgrad")
def gemm_4bit_dgrad(
    grad: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """``grad @ weight``: the gradient that :func:`gemm_4bit` passes to its activation."""
    nested = (absmax_8bit, absmax_code, absmax_offset)
    return torch.matmul(grad, dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, grad.dtype, *nested))


@implements("reference", "gemv_4bit")
def gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """``A @ weight.T`` with the 16 levels given as a tensor."""
    weight = torch.empty(math.prod(shapeB), dtype=A.dtype, device=A.device)
    _decode(B, absmax, blocksize, code.view(-1), weight)
    return torch.nn.functional.linear(A, weight.view(tuple(shapeB)))


@implements("reference", "gemv_4bit.out")
def gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor
) -> None:
    """:func:`gemv_4bit` into ``out``."""
    out.copy_(gemv_4bit(A, B, shapeB, absmax, code, blocksize))
