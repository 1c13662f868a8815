"""LLM.int8() on tensors: absmax quantization by row, exact integer products, scaled back.

Source: Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv:2208.07339.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import backends as _backends  # defines and binds the ops
from halfbyte.errors import ArgumentError
from halfbyte.formats import int8
from halfbyte.functional.results import into

__all__ = [
    "C",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mixed_scaled_mm",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
]

C = float(int8.CODE_MAX)
"""Largest int8 code."""

_ops = torch.ops.halfbyte
del _backends


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize every row to int8 by its own absmax.

    Args:
        A: fp32, bf16 or fp16, ``(..., K)``; every vector along the last dimension is a row.
        threshold: Elements of at least this magnitude are outliers: left out of absmax, their code 0. With more than
            one row, whole columns with an outlier get code 0. 0 turns this off.

    Returns:
        int8 codes of A's shape; fp32 absmax ``(rows,)``; int64 columns with outliers, rising (None without
        threshold).

    Raises:
        ArgumentError: Another dtype, or a negative threshold.

    >>> codes, absmax, columns = int8_vectorwise_quant(torch.tensor([[1.0, -0.5, 8.0]]), threshold=6.0)
    >>> codes.tolist(), absmax.tolist(), columns.tolist()
    ([[127, -64, 0]], [1.0], [2])
    """
    return _ops.int8_vectorwise_quant(A, threshold)


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """fp32 values ``code * absmax / 127`` of row-wise int8 codes.

    Args:
        A: int8, ``(..., K)``.
        stats: fp32 absmax of every row.

    >>> int8_vectorwise_dequant(torch.tensor([[127, -127]], dtype=torch.int8), torch.tensor([2.0])).tolist()
    [[2.0, -2.0]]
    """
    return _ops.int8_vectorwise_dequant(A, stats)


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """``A @ B.T`` of int8 matrices as exact int32 sums.

    Args:
        A: ``(..., K)``.
        B: ``(N, K)``.
        out: Filled with the result where given, int32 ``(..., N)``.
        dtype: int32, the only one.

    >>> row = torch.full((1, 4000), 127, dtype=torch.int8)
    >>> int8_linear_matmul(row, row).item() == 4000 * 127 * 127
    True
    """
    if dtype != torch.int32:
        raise ArgumentError(f"dtype is {dtype}", expected="torch.int32: the sums are exact integers")
    if out is None:
        return _ops.int8_linear_matmul(A, B)
    _ops.int8_linear_matmul.out(A, B, out=out)
    return out


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Scale int32 sums of codes back: ``sum * row absmax * column absmax / 127**2 + bias``.

    Args:
        A: int32, ``(..., N)``.
        row_stats: fp32 absmax of every row.
        col_stats: fp32 absmax of every column, ``(N,)``.
        out: Filled with the result where given; its dtype is that of the result.
        bias: ``(N,)``.

    Returns:
        fp16, unless ``out`` says otherwise. :func:`int8_scaled_mm` takes a dtype.
    """
    dtype = torch.float16 if out is None else out.dtype
    return into(out, _ops.int8_mm_dequant(A, row_stats, col_stats, dtype, bias))


def int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``A @ B.T + bias`` of quantized matrices: :func:`int8_linear_matmul` and :func:`int8_mm_dequant` in one.

    Args:
        A: int8, ``(..., K)``.
        B: int8, ``(N, K)``.
        row_stats: fp32 absmax of A's rows.
        col_stats: fp32 absmax of B's rows.
        bias: ``(N,)``; added in fp32.
        dtype: Of the result; None is fp16.
    """
    return _ops.int8_scaled_mm(A, B, row_stats, col_stats, bias, dtype)


def int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The mixed-precision product: int8 codes, plus the outlier columns of ``A`` times the dequantized weight.

    Args:
        A: The activation, ``(..., K)``.
        CA: Its codes, from :func:`int8_vectorwise_quant` with a threshold.
        CB: The weight's codes, ``(N, K)``.
        SCA: fp32 absmax of A's rows.
        SCB: fp32 absmax of the weight's rows.
        outlier_cols: Columns with outliers, int64.
        bias: ``(N,)``.

    Returns:
        The product in A's dtype, ``(..., N)``, rounded once; and ``A[:, outlier_cols]``, or None without them.
    """
    return _ops.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, outlier_cols, bias)


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Quantize to int8 by row and by column, on any device.

    Args:
        A: fp32, bf16 or fp16, ``(..., K)``.
        col_stats: Filled with the absmax of the columns where given.
        row_stats: Filled with the absmax of the rows where given.
        out_col: Filled with the codes by column where given.
        out_row: Filled with the codes by row where given.
        threshold: As in :func:`int8_vectorwise_quant`.

    Returns:
        Codes by row, codes by column, absmax of rows, absmax of columns, outlier columns (None without threshold).
    """
    by_row, by_column, rows, columns, outliers = _ops.int8_double_quant(A, threshold)
    return into(out_row, by_row), into(out_col, by_column), into(row_stats, rows), into(col_stats, columns), outliers
