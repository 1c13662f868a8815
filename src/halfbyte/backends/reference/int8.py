"""LLM.int8() ops in plain torch: absmax quantization by row, exact integer products, outliers in full precision."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.backends.registry import implements
from halfbyte.formats import int8

__all__ = ["int8_linear", "int8_vectorwise_quant", "quantize_rows"]

_TINY = 2.0**-100
_BOOST = 2.0**100


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes ``round(x * (127 * (1 / absmax)))``, each step in fp32, halves to even; and fp32 absmax of every row.

    A zero row has absmax 0 and codes 0. A row with inf has absmax inf and codes 0, one with NaN absmax NaN and codes 0,
    so that its products are NaN and those of other rows are not.

    Args:
        values: fp32, ``(rows, columns)``.
    """
    if values.shape[1] == 0:
        return values.to(torch.int8), values.new_zeros(values.shape[0])
    absmax = values.abs().amax(dim=1)
    # The factor overflows below 4e-37: such rows are scaled up first, which is exact.
    boost = torch.where(absmax < _TINY, _BOOST, 1.0)
    scale = torch.where(absmax == 0, 0.0, (absmax * boost).reciprocal() * int8.CODE_MAX)
    scaled = (values * boost[:, None]).mul_(scale[:, None]).round_()
    return scaled.nan_to_num_(nan=0.0).to(torch.int8), absmax


def _rows(A: Tensor) -> Tensor:
    return A.reshape(-1, A.shape[-1]) if A.numel() else A.reshape(A.shape[:-1].numel(), A.shape[-1])


def _split(A: Tensor, threshold: float) -> tuple[Tensor, Tensor | None]:
    """fp32 rows of ``A`` with its outliers zeroed, and where those are (None without a threshold)."""
    values = _rows(A).float()
    if threshold == 0.0:
        return values, None
    outliers = values.abs() >= threshold
    return values.masked_fill(outliers, 0.0), outliers


@implements("reference", "int8_vectorwise_quant")
def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes of A's shape, fp32 absmax ``(rows,)`` over what is no outlier, and the columns that hold outliers.

    Outliers get code 0; with more than one row so do their whole columns, which are left to the caller.
    """
    values, outliers = _split(A, threshold)
    codes, absmax = quantize_rows(values)
    columns = None
    if outliers is not None:
        columns = outliers.any(dim=0).nonzero().view(-1)
        if codes.shape[0] > 1:
            codes[:, columns] = 0
    return codes.view(A.shape), absmax, columns


@implements("reference", "int8_double_quant")
def int8_double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Codes by row and by column, absmax by row and by column, outlier columns."""
    codes, absmax, columns = int8_vectorwise_quant(A, threshold)
    values, _ = _split(A, threshold)
    by_column, column_absmax = quantize_rows(values.t().contiguous())
    return codes, by_column.t().contiguous().view(A.shape), absmax, column_absmax, columns


@implements("reference", "int8_vectorwise_dequant")
def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """``code * absmax / 127``, fp32 of A's shape."""
    return (_rows(A) * stats.view(-1, 1) * int8.STEP).view(A.shape)


@implements("reference", "int8_linear_matmul")
def int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    """``A @ B.T`` as exact int32."""
    rows = _rows(A)
    out = torch.zeros(rows.shape[0], B.shape[0], dtype=torch.int32, device=A.device)
    # fp32 products (which every device has) of so few terms that each is exact; their sum is one of integers.
    for start in range(0, rows.shape[1], int8.EXACT_FP32_TERMS):
        piece = slice(start, start + int8.EXACT_FP32_TERMS)
        out += (rows[:, piece].float() @ B[:, piece].float().t()).to(torch.int32)
    return out.view(*A.shape[:-1], B.shape[0])


@implements("reference", "int8_linear_matmul.out")
def int8_linear_matmul_out(A: Tensor, B: Tensor, *, out: Tensor) -> None:
    """:func:`int8_linear_matmul` into ``out``."""
    out.copy_(int8_linear_matmul(A, B))


def _scaled_product(A: Tensor, B: Tensor, row_stats: Tensor, col_stats: Tensor) -> Tensor:
    """fp32 ``A @ B.T`` scaled; more columns than int32 sums are sure to hold are taken in parts."""
    rows, most = _rows(A), int8.EXACT_INT32_TERMS
    out = _scale(int8_linear_matmul(rows[:, :most], B[:, :most]), row_stats, col_stats)
    for start in range(most, rows.shape[1], most):
        part = slice(start, start + most)
        out += _scale(int8_linear_matmul(rows[:, part], B[:, part]), row_stats, col_stats)
    return out


def _scale(sums: Tensor, row_stats: Tensor, col_stats: Tensor) -> Tensor:
    """fp32 products from their int32 sums of codes, two-dimensional.

    Activations may be huge, weights are not: in this order nothing overflows that the result does not.
    """
    return _rows(sums).float() * (col_stats.view(1, -1) * int8.STEP_SQUARED) * row_stats.view(-1, 1)


@implements("reference", "int8_mm_dequant")
def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, dtype: torch.dtype | None = None, bias: Tensor | None = None
) -> Tensor:
    """``sum * row absmax * column absmax / 127**2 + bias`` in fp32, rounded once to ``dtype`` (None: fp16)."""
    out = _scale(A, row_stats, col_stats)
    if bias is not None:
        out += bias
    return out.to(dtype or torch.float16).view(A.shape)


@implements("reference", "int8_scaled_mm")
def int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Product of two quantized matrices, ``A @ B.T + bias``, in ``dtype`` (None: fp16)."""
    out = _scaled_product(A, B, row_stats, col_stats)
    if bias is not None:
        out += bias
    return out.to(dtype or torch.float16).view(*A.shape[:-1], B.shape[0])


@implements("reference", "int8_mixed_scaled_mm")
def int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Product of the codes plus that of A's outlier columns with the dequantized weight, and those columns of A."""
    out = _scaled_product(CA, CB, SCA, SCB)
    if bias is not None:
        out += bias
    columns = None
    if outlier_cols is not None:
        columns = _rows(A)[:, outlier_cols]
        out += columns.float() @ int8_vectorwise_dequant(CB[:, outlier_cols], SCB).t()
    return out.to(A.dtype).view(*A.shape[:-1], CB.shape[0]), columns


@implements("reference", "int8_linear")
def int8_linear(
    A: Tensor,
    CB: Tensor,
    SCB: Tensor,
    threshold: float = 0.0,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """LLM.int8() of every row by itself: outliers times weight in fp32, the rest in int8, rounded once to A's dtype.

    A row's outliers are its own, so that it does not matter which rows it is computed with. ``weight`` is the
    unquantized weight, where there is one, for the outliers.
    """
    values, outliers = _split(A, threshold)
    codes, absmax = quantize_rows(values)
    out = _scaled_product(codes, CB, absmax, SCB)
    if outliers is not None:
        columns = outliers.any(dim=0).nonzero().view(-1)
        apart = _rows(A)[:, columns].float().masked_fill(~outliers[:, columns], 0.0)
        full = int8_vectorwise_dequant(CB[:, columns], SCB) if weight is None else weight[:, columns].float()
        out += apart @ full.t()
    if bias is not None:
        out += bias
    return out.to(A.dtype).view(*A.shape[:-1], CB.shape[0])


@implements("reference", "int8_linear_dgrad")
def int8_linear_dgrad(grad: Tensor, CB: Tensor, SCB: Tensor) -> Tensor:
    """``grad @ weight`` with the weight dequantized to grad's dtype."""
    return torch.matmul(grad, int8_vectorwise_dequant(CB, SCB).to(grad.dtype))
