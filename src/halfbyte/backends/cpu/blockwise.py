"""8-bit blockwise ops on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.backends.cpu import memory, tables
from halfbyte.backends.cpu.call import DTYPES, kernel
from halfbyte.backends.cpu.kernels.quantize import UNIT
from halfbyte.backends.registry import implements
from halfbyte.formats import blocks

__all__ = ["dequantize_blockwise", "quantize_blockwise"]

PIECE = 1 << 15


def _declines_quantize(
    A: Tensor, code: Tensor, blocksize: int, *, out: Tensor | None = None, absmax: Tensor | None = None
) -> str | None:
    del A, out, absmax
    if blocksize % UNIT:
        return f"blocksize {blocksize} is no multiple of {UNIT}"
    found = _buckets(code)
    return found if isinstance(found, str) else None


def _buckets(code: Tensor) -> tables.Buckets | str:
    return tables.buckets(code.detach().contiguous().numpy().tobytes())


@implements("cpu", "quantize_blockwise", declines=_declines_quantize)
def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """uint8 index of the nearest value of ``code`` (ties go down), of A's shape, and fp32 absmax ``(blocks,)``."""
    out = memory.empty(A.shape, torch.uint8)
    absmax = torch.empty(blocks.block_count(A.numel(), blocksize), dtype=torch.float32)
    _quantize(A, code, blocksize, out.view(-1), absmax)
    return out, absmax


@implements("cpu", "quantize_blockwise.out", declines=_declines_quantize)
def quantize_blockwise_out(A: Tensor, code: Tensor, blocksize: int, *, out: Tensor, absmax: Tensor) -> None:
    """:func:`quantize_blockwise` into ``out`` and ``absmax``."""
    if out.is_contiguous() and absmax.is_contiguous():
        _quantize(A, code, blocksize, out.view(-1), absmax)
        return
    codes, scales = quantize_blockwise(A, code, blocksize)
    out.copy_(codes)
    absmax.copy_(scales)


def _quantize(A: Tensor, code: Tensor, blocksize: int, out: Tensor, absmax: Tensor) -> None:
    flat = A.detach().contiguous().view(-1)
    whole = flat.numel() // blocksize
    _quantize_blocks(flat, code, blocksize, out, absmax, whole)
    tail = flat[whole * blocksize :]
    if tail.numel():
        # Filled up with zeros, which do not change the absmax.
        block = torch.zeros(blocks.block_count(tail.numel(), UNIT) * UNIT, dtype=tail.dtype)
        block[: tail.numel()] = tail
        codes = torch.empty(block.numel(), dtype=torch.uint8)
        _quantize_blocks(block, code, block.numel(), codes, absmax[-1:], 1)
        out[whole * blocksize :] = codes[: tail.numel()]


def _quantize_blocks(flat: Tensor, code: Tensor, blocksize: int, out: Tensor, absmax: Tensor, count: int) -> None:
    found = _buckets(code)
    if not count or isinstance(found, str):
        return
    a_piece = max(1, PIECE // blocksize)
    kernel("quantize_blockwise", dtype=DTYPES[flat.dtype], repeats=found.repeats)(
        blocks.block_count(count, a_piece),
        flat.data_ptr(),
        out.data_ptr(),
        absmax.data_ptr(),
        found.center,
        found.shift,
        count,
        blocksize,
        a_piece,
    )


@implements("cpu", "dequantize_blockwise")
def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """``code[A] * absmax`` in fp32, rounded once to ``dtype``, of A's shape."""
    out = memory.empty(A.shape, dtype)
    _dequantize(A, absmax, code, blocksize, out)
    return out


@implements("cpu", "dequantize_blockwise.out")
def dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, *, out: Tensor
) -> None:
    """:func:`dequantize_blockwise` into ``out``."""
    target = out if out.is_contiguous() else torch.empty(A.shape, dtype=dtype)
    _dequantize(A, absmax, code, blocksize, target)
    if target is not out:
        out.copy_(target)


def _dequantize(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, out: Tensor) -> None:
    flat, scales, table = A.contiguous(), absmax.contiguous(), code.contiguous()
    count = blocks.block_count(flat.numel(), blocksize)
    if not count:
        return
    a_piece = max(1, PIECE // blocksize)
    kernel("dequantize_blockwise", dtype=DTYPES[out.dtype])(
        blocks.block_count(count, a_piece),
        flat.data_ptr(),
        out.data_ptr(),
        scales.data_ptr(),
        table.data_ptr(),
        flat.numel(),
        count,
        blocksize,
        a_piece,
    )
