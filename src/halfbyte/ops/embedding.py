"""Rows of a packed 4-bit table by their number: what an embedding layer looks up, without the rest of the table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError
from halfbyte.ops import arguments as check
from halfbyte.ops.definition import define

__all__ = ["check_rows"]


def _check(
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
) -> None:
    if indices.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"indices are {indices.dtype}", expected="int64 or int32", hint="use .long()")
    check.check_format_4bit(quant_type, blocksize)
    check.check_float_dtype(dtype)
    if len(shapeB) != 2:
        raise ArgumentError(f"the table's shape is {tuple(shapeB)}", expected="two dimensions, (rows, columns)")
    check.check_packed(B, math.prod(shapeB))
    check.check_absmax(absmax, math.prod(shapeB), blocksize, absmax_8bit, absmax_code, absmax_offset)


def check_rows(indices: Tensor, rows: int) -> None:
    """Refuse indices outside a table of ``rows`` rows. For backends that can read them without waiting: the CPU's.

    Raises:
        ArgumentError: One is negative, or too large.

    >>> check_rows(torch.tensor([0, 7]), 7)
    Traceback (most recent call last):
        ...
    halfbyte.errors.ArgumentError: index 7 into a table of 7 rows; expected 0 to 6
    hint: ids of another tokenizer, or a table that was not resized with it
    """
    if not indices.numel():
        return
    least, largest = (int(bound) for bound in torch.aminmax(indices))
    if least < 0 or largest >= rows:
        raise ArgumentError(
            f"index {least if least < 0 else largest} into a table of {rows} rows",
            expected=f"0 to {rows - 1}",
            hint="ids of another tokenizer, or a table that was not resized with it",
        )


define(
    "embedding_4bit(Tensor indices, Tensor B, SymInt[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    "ScalarType dtype, Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    check=_check,
    result=lambda indices, B, shapeB, absmax, blocksize, quant_type, dtype, *_nested, **_named: B.new_empty(
        (*indices.shape, shapeB[1]), dtype=dtype
    ),
)
