"""Launcher of the look-up in a packed 4-bit table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.backends.registry import implements
from halfbyte.backends.triton.dequantize import as_bytes, readable
from halfbyte.backends.triton.device import pairs_of
from halfbyte.backends.triton.kernels.embedding import _embedding_4bit_kernel
from halfbyte.backends.triton.launch import dense, on_device, start

__all__ = ["embedding_4bit"]

LANES = 128
"""Most lanes of a program; each takes 8 codes."""


def _declines(indices: Tensor, B: Tensor, shapeB: Sequence[int], *_rest: Any, **_named: Any) -> str | None:
    if shapeB[1] % 8:
        return f"rows of {shapeB[1]} values: no multiple of 8"
    if indices.numel() * (-(-shapeB[1] // (8 * LANES))) >= 1 << 31:
        return "more programs than one launch holds"
    return None


@implements("triton", "embedding_4bit", declines=_declines)
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
    """``dequantized table[indices]`` from the codes and scales of those rows only; NaN for no row of the table."""
    rows, columns = shapeB
    out = torch.empty((*indices.shape, columns), dtype=dtype, device=B.device)
    if not out.numel():
        return out
    lanes = min(LANES, max(32, 1 << (columns // 8 - 1).bit_length()))
    row_tiles = -(-columns // (8 * lanes))
    nested = readable((absmax_8bit, absmax_code, absmax_offset))
    with on_device(B.device.index):
        start(
            _embedding_4bit_kernel,
            (indices.numel() * row_tiles,),
            indices.contiguous(),
            as_bytes(B),
            dense(absmax),
            *nested,
            pairs_of(quant_type, B.device.index),
            out,
            rows,
            columns,
            row_tiles,
            blocksize,
            lanes,
            absmax_8bit is not None,
            num_warps=lanes // 32,
            enable_fp_fusion=False,
        )
    return out
