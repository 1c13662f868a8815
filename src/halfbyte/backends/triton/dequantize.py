"""Launchers of 4-bit dequantization: a whole tensor, or the rows or columns of it that fit the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halfbyte.backends.registry import implements
from halfbyte.backends.triton.device import pairs_of
from halfbyte.backends.triton.kernels.dequantize import _dequantize_4bit_kernel
from halfbyte.backends.triton.launch import ALIGNMENT, Launcher, dense, on_device, raw_stream

__all__ = ["Nested", "dequantize_4bit", "dequantize_into", "tiling", "whole_filling"]

Nested = tuple[Tensor | None, Tensor | None, Tensor | None]
"""absmax_8bit, absmax_code and absmax_offset of an op: three tensors, or three times None."""

LANES = 128
TILES = 4
SPAN = 8 * LANES * TILES
"""Codes of one program."""

MOST_LAUNCHERS = 4096
_launchers: dict[tuple[object, ...], Launcher] = {}
"""By all that a compiled kernel is specialised by: every number, every dtype, which addresses are aligned."""


def tiling(slice_cols: int) -> tuple[int, int]:
    """Lanes and tiles of a program that takes a part of one of many rows: no more than the part fills.

    >>> tiling(512), tiling(3584), tiling(100)
    ((64, 1), (128, 4), (32, 1))
    """
    lanes = min(LANES, max(32, 1 << (-(-slice_cols // 8) - 1).bit_length()))
    return lanes, min(TILES, 1 << (-(-slice_cols // (8 * lanes)) - 1).bit_length())


def dequantize_into(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: Nested,
    blocksize: int,
    levels: Tensor,
    *,
    rows: int,
    cols: int,
    first: int = 0,
    end: int,
) -> None:
    """Fill contiguous ``out`` ``(rows, slice_cols)`` from ``first`` of every row of ``cols`` codes.

    Args:
        levels: The pairs of levels of :func:`halfbyte.backends.triton.device.pairs_of`.
        rows: 1, or rows of a multiple of 8 codes.
        first: First code of a row, a multiple of 8.
        end: Number of codes in all.
    """
    slice_cols = out.numel() // rows
    lanes, tiles = tiling(slice_cols) if rows > 1 else (LANES, TILES)
    row_tiles = -(-slice_cols // (8 * lanes * tiles))
    tensors = (packed, absmax, *nested, levels, out)
    addresses = tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)
    aligned = tuple(address is None or address % ALIGNMENT == 0 for address in addresses)
    numbers = (cols, first, slice_cols, row_tiles, end)
    index, grid = out.device.index, (rows * row_tiles, 1, 1)
    key = _key(numbers, blocksize, packed.dtype, absmax, out.dtype, nested, index, aligned)
    launcher = _launchers.get(key)
    with on_device(index):
        if launcher is not None and launcher.compiled():
            launcher.direct(grid, raw_stream(index), *addresses, *numbers)
            return
        constants = (blocksize, lanes, tiles, nested[0] is not None)
        launcher = Launcher(_dequantize_4bit_kernel, constants, num_warps=lanes // 32, enable_fp_fusion=False)
        launcher.ordinary(grid, *tensors, *numbers)
    if len(_launchers) >= MOST_LAUNCHERS:
        _launchers.clear()
    _launchers[key] = launcher


def _key(
    numbers: tuple[int, ...], blocksize: int, storage: torch.dtype, absmax: Tensor, dtype: torch.dtype, nested: Nested,
    index: int, aligned: tuple[bool, ...],
) -> tuple[object, ...]:  # fmt: skip
    """Of :data:`_launchers`: sizes, dtypes of the packed codes and of the result, which of the tensors are aligned."""
    return (numbers, blocksize, storage, absmax.dtype, dtype, nested[0] is None, index, aligned)


def whole_filling(
    packed: Tensor, absmax: Tensor, nested: Nested, blocksize: int, quant_type: str, numel: int, dtype: torch.dtype
) -> Callable[..., None] | None:
    """What dequantizes a whole weight to an aligned address, its tensors as they lie; None where that never ran.

    Args:
        packed: Contiguous, of any storage dtype; aligned, like the scales.
        absmax: As ops take it.
        nested: As ops take them, readable.
        blocksize: Values per block.
        quant_type: ``"nf4"`` or ``"fp4"``.
        numel: Codes.
        dtype: Of the result.
    """
    index, row_tiles = packed.device.index, -(-numel // SPAN)
    numbers = (numel, 0, numel, row_tiles, numel)
    launcher = _launchers.get(_key(numbers, blocksize, torch.uint8, absmax, dtype, nested, index, (True,) * 7))
    if launcher is None:
        return None
    tensors = (packed, absmax, *nested, pairs_of(quant_type, index))
    return launcher.bound((row_tiles, 1, 1), index, tensors, numbers)


def as_bytes(packed: Tensor) -> Tensor:
    """The packed codes as contiguous uint8, whatever their storage dtype."""
    return packed.contiguous().view(torch.uint8)


def readable(nested: Nested) -> Nested:
    """``nested`` as kernels read it: without gaps, its offset in fp32 (checkpoints may hold another dtype)."""
    absmax_8bit, absmax_code, absmax_offset = nested
    if absmax_offset is None:
        return nested
    offset = absmax_offset if absmax_offset.dtype == torch.float32 else absmax_offset.float()
    return dense(absmax_8bit), dense(absmax_code), offset


@implements("triton", "dequantize_4bit")
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
    """``levels[code] * absmax`` in fp32, rounded once to ``dtype``, of ``shape``; nested absmax in the same kernel."""
    out = torch.empty(tuple(shape), dtype=dtype, device=A.device)
    numel = math.prod(shape)
    if numel:
        nested = readable((absmax_8bit, absmax_code, absmax_offset))
        pairs = pairs_of(quant_type, A.device.index)
        dequantize_into(out, as_bytes(A), dense(absmax), nested, blocksize, pairs, rows=1, cols=numel, end=numel)
    return out


@implements("triton", "dequantize_4bit.out")
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
    numel = math.prod(shape)
    if not out.is_contiguous():
        out.copy_(
            dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype, absmax_8bit, absmax_code, absmax_offset)
        )
    elif numel:
        nested = readable((absmax_8bit, absmax_code, absmax_offset))
        pairs = pairs_of(quant_type, A.device.index)
        dequantize_into(out, as_bytes(A), dense(absmax), nested, blocksize, pairs, rows=1, cols=numel, end=numel)
