"""Rows of a packed 4-bit table in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.backends.reference import coding
from halfbyte.backends.reference.four_bit import BITS, decode_absmax
from halfbyte.backends.registry import implements
from halfbyte.ops.embedding import check_rows

__all__ = ["embedding_4bit"]


@implements("reference", "embedding_4bit")
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
    """``dequantized table[indices]`` from the codes and scales of those rows only.

    An index outside the table is an error on the CPU. Elsewhere nobody waits for the device to find out: its row is
    NaN.
    """
    rows, columns = shapeB
    flat = indices.reshape(-1).long()
    if flat.device.type == "cpu":
        check_rows(flat, rows)
    outside = (flat < 0) | (flat >= rows)
    place = torch.where(outside, 0, flat)[:, None] * columns + torch.arange(columns, device=B.device)
    stream = B.contiguous().view(-1).view(torch.uint8)
    # The even element of a byte is in its high nibble.
    codes = (stream[place >> 1].int() >> (BITS * (1 - (place & 1)))) & 15
    block = place // blocksize
    used, where = torch.unique(block, return_inverse=True)
    scales = decode_absmax(absmax, absmax_8bit, absmax_code, absmax_offset, used)[where]
    values = coding.table_of(quant_type, B.device)[codes] * scales
    values = torch.where(outside[:, None], torch.nan, values)
    return values.to(dtype).view(*indices.shape, columns)
