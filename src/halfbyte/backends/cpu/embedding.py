"""Rows of a packed 4-bit table on the CPU: their bytes and scales are gathered, then decoded like any weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.backends.cpu import memory, tables
from halfbyte.backends.cpu.four_bit import decode
from halfbyte.backends.cpu.scales import Scales, decoded
from halfbyte.backends.registry import implements
from halfbyte.ops.embedding import check_rows

__all__ = ["embedding_4bit"]


def _declines(
    indices: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, blocksize: int, *_rest: Any, **_named: Any
) -> str | None:
    if shapeB[1] % blocksize:
        return f"rows of {shapeB[1]} values share blocks of {blocksize} with their neighbours"
    return None


@implements("cpu", "embedding_4bit", declines=_declines)
def embedding_4bit(
    indices: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """``dequantized table[indices]`` from the codes and scales of those rows only."""
    rows, columns = shapeB
    flat = indices.reshape(-1)
    check_rows(flat, rows)
    packed = B.contiguous().view(-1).view(torch.uint8).view(rows, columns // 2).index_select(0, flat)
    per_row = columns // blocksize
    if absmax_8bit is None or absmax_code is None or absmax_offset is None:
        scales = absmax.reshape(rows, per_row).index_select(0, flat)
    else:
        numbers = flat.long()[:, None] * per_row + torch.arange(per_row)
        scales = decoded(absmax, absmax_8bit, absmax_code, absmax_offset, numbers)
    out = memory.empty((*indices.shape, columns), dtype)
    decode(packed, Scales(scales), blocksize, tables.lookup_of(quant_type), out, end=out.numel())
    return out
