"""4-bit quantize and dequantize on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.backends.cpu import host, memory, tables
from halfbyte.backends.cpu.call import DTYPES, kernel
from halfbyte.backends.cpu.scales import Scales
from halfbyte.backends.registry import implements
from halfbyte.formats import blocks
from halfbyte.formats.codebook import codebook

__all__ = ["decode", "dequantize_4bit", "quantize_4bit"]

BITS = 4
PIECE = 1 << 15
"""Values of one piece of work: some microseconds, and a multiple of every block size."""


@implements("cpu", "quantize_4bit")
def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed codes ``(bytes / itemsize, 1)`` and fp32 absmax ``(blocks,)`` of ``A`` in row-major order."""
    flat = A.detach().contiguous().view(-1)
    numel = flat.numel()
    packed = memory.empty((blocks.packed_bytes(numel, BITS),), torch.uint8)
    absmax = torch.empty(blocks.block_count(numel, blocksize), dtype=torch.float32)
    whole = numel // blocksize
    _quantize_blocks(flat, blocksize, quant_type, packed, absmax, whole)
    short = numel - whole * blocksize
    if short:
        _quantize_short(flat[whole * blocksize :], blocksize, quant_type, packed, absmax)
    return packed.view(quant_storage).view(-1, 1), absmax


def _quantize_blocks(flat: Tensor, blocksize: int, quant_type: str, packed: Tensor, absmax: Tensor, count: int) -> None:
    if not count:
        return
    found = tables.search(quant_type)
    buckets = found.buckets and host.level().wide_lookup
    run = kernel("quantize_4bit", dtype=DTYPES[flat.dtype], coding=found.coding, buckets=buckets)
    a_piece = max(1, PIECE // blocksize)
    pieces = blocks.block_count(count, a_piece)
    run(pieces, flat.data_ptr(), packed.data_ptr(), absmax.data_ptr(), found.table.address, count, blocksize, a_piece)


def _quantize_short(tail: Tensor, blocksize: int, quant_type: str, packed: Tensor, absmax: Tensor) -> None:
    """The last block, filled up with zeros, which change neither its absmax nor its codes."""
    block = torch.zeros(blocksize, dtype=tail.dtype)
    block[: tail.numel()] = tail
    codes = torch.empty(blocks.packed_bytes(blocksize, BITS), dtype=torch.uint8)
    _quantize_blocks(block, blocksize, quant_type, codes, absmax[-1:], 1)
    size = blocks.packed_bytes(tail.numel(), BITS)
    packed[packed.numel() - size :] = codes[:size]
    if tail.numel() % 2:
        packed[-1] = (packed[-1] & 0xF0) | codebook(quant_type).zero_code


def decode(
    packed: Tensor,
    scales: Scales,
    blocksize: int,
    table: tables.Table,
    out: Tensor,
    *,
    first: int = 0,
    end: int,
    segment: tuple[int, int] | None = None,
    exact: bool = True,
) -> None:
    """Values of elements ``first`` to ``end`` into contiguous ``out``.

    Args:
        packed: Contiguous, any dtype.
        scales: Of the whole weight.
        table: Lookup block of the codebook.
        segment: (length, stride): only the first ``length`` of every ``stride`` elements; all if None.
        exact: Halves are rounded to even; otherwise up, as is good enough for a product.
    """
    if end <= first:
        return
    run = kernel("dequantize_4bit", dtype=DTYPES[out.dtype], nested=scales.nested, halves=blocksize < 64, exact=exact)
    length, stride = segment or (PIECE, PIECE)
    segments = -(-(end - first) // stride)
    a_piece = max(1, PIECE // length)
    run(
        -(-segments // a_piece),
        packed.data_ptr(),
        out.data_ptr(),
        table.address,
        *scales.addresses,
        blocksize.bit_length() - 1,
        first,
        stride,
        length,
        end,
        segments,
        a_piece,
    )


@implements("cpu", "dequantize_4bit")
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
    out = memory.empty(shape, dtype)
    scales = Scales(absmax, absmax_8bit, absmax_code, absmax_offset)
    decode(A.contiguous(), scales, blocksize, tables.lookup_of(quant_type), out, end=math.prod(shape))
    return out


@implements("cpu", "dequantize_4bit.out")
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
    """:func:`dequantize_4bit` into ``out``, without a copy where ``out`` is contiguous."""
    scales = Scales(absmax, absmax_8bit, absmax_code, absmax_offset)
    target = out if out.is_contiguous() else torch.empty(tuple(shape), dtype=dtype)
    decode(A.contiguous(), scales, blocksize, tables.lookup_of(quant_type), target, end=math.prod(shape))
    if target is not out:
        out.copy_(target)
