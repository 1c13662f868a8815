"""LLM.int8() ops: int8 codes with one fp32 absmax a row, products with exact integer sums, outliers in full precision.

``int8_linear`` is the whole forward pass in one op, so that a backend can fuse it and no caller has to ask the device
how many outliers there are. The others are the steps that bitsandbytes names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError
from halfbyte.ops import arguments as check
from halfbyte.ops.definition import define

__all__: list[str] = []


def _check_rows(A: Tensor, what: str) -> None:
    if A.dim() == 0:
        raise ArgumentError(f"{what} is a scalar", expected="at least one dimension")


def _check_codes(A: Tensor, what: str, dim: int | None = None) -> None:
    if A.dtype != torch.int8:
        raise ArgumentError(f"{what} is {A.dtype}", expected="int8")
    _check_rows(A, what)
    if dim is not None and A.dim() != dim:
        raise ArgumentError(f"{what} has shape {tuple(A.shape)}", expected=f"{dim} dimensions")


def _check_stats(stats: Tensor, what: str, count: int) -> None:
    if stats.dtype != torch.float32 or stats.numel() != count:
        raise ArgumentError(f"{what} is {stats.dtype} with {stats.numel()} values", expected=f"float32 with {count}")


def _check_bias(bias: Tensor | None, count: int) -> None:
    if bias is None:
        return
    check.check_float(bias, "bias")
    if bias.shape != (count,):
        raise ArgumentError(f"bias has shape {tuple(bias.shape)}", expected=f"({count},)")


def _check_inner(A: Tensor, B: Tensor, dim: int = 1) -> None:
    if A.shape[-1] != B.shape[dim]:
        raise ArgumentError(
            f"shapes {tuple(A.shape)} and {tuple(B.shape)} do not multiply",
            expected=f"{B.shape[dim]} as the first one's last dimension",
        )


def _check_threshold(threshold: float) -> None:
    if not threshold >= 0.0:
        raise ArgumentError(f"threshold is {threshold}", expected="0 (no outliers) or a positive number, such as 6.0")


def _row_count(A: Tensor) -> int:
    return math.prod(A.shape[:-1])


def _check_quant(A: Tensor, threshold: float = 0.0) -> None:
    check.check_float(A, "the tensor to quantize")
    _check_rows(A, "the tensor to quantize")
    _check_threshold(threshold)


def _some_columns(A: Tensor, threshold: float) -> Tensor | None:
    if threshold == 0.0:
        return None
    return A.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def _quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    stats = A.new_empty((_row_count(A),), dtype=torch.float32)
    return A.new_empty(A.shape, dtype=torch.int8), stats, _some_columns(A, threshold)


def _double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    codes, stats, columns = _quant(A, threshold)
    return codes, torch.empty_like(codes), stats, A.new_empty((A.shape[-1],), dtype=torch.float32), columns


def _check_dequant(A: Tensor, stats: Tensor) -> None:
    _check_codes(A, "A")
    _check_stats(stats, "stats", _row_count(A))


def _check_product(A: Tensor, B: Tensor, *, out: Tensor | None = None) -> None:
    _check_codes(A, "A")
    _check_codes(B, "B", 2)
    _check_inner(A, B)
    if out is not None:
        check.check_out(out, torch.int32, (*A.shape[:-1], B.shape[0]), A.device)


def _check_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, dtype: torch.dtype | None = None, bias: Tensor | None = None
) -> None:
    if A.dtype != torch.int32:
        raise ArgumentError(f"A is {A.dtype}", expected="int32, sums of products of codes")
    _check_rows(A, "A")
    _check_stats(row_stats, "row_stats", _row_count(A))
    _check_stats(col_stats, "col_stats", A.shape[-1])
    check.check_float_dtype(dtype or torch.float16)
    _check_bias(bias, A.shape[-1])


def _check_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    _check_product(A, B)
    _check_stats(row_stats, "row_stats", _row_count(A))
    _check_stats(col_stats, "col_stats", B.shape[0])
    check.check_float_dtype(dtype or torch.float16)
    _check_bias(bias, B.shape[0])


def _check_mixed(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    check.check_float(A, "A")
    if A.shape != CA.shape:
        raise ArgumentError(f"CA has shape {tuple(CA.shape)}", expected=f"that of A, {tuple(A.shape)}")
    _check_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype)
    if outlier_cols is not None and (outlier_cols.dtype != torch.int64 or outlier_cols.dim() != 1):
        raise ArgumentError(
            f"outlier_cols is {outlier_cols.dtype} of shape {tuple(outlier_cols.shape)}",
            expected="int64 of one dimension, as int8_vectorwise_quant returns it",
        )


def _mixed(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    out = A.new_empty((*A.shape[:-1], CB.shape[0]))
    return out, None if outlier_cols is None else A.new_empty((_row_count(A), outlier_cols.shape[0]))


def _check_weight(CB: Tensor, SCB: Tensor) -> None:
    _check_codes(CB, "the weight", 2)
    _check_stats(SCB, "SCB", CB.shape[0])


def _check_linear(
    A: Tensor,
    CB: Tensor,
    SCB: Tensor,
    threshold: float = 0.0,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    check.check_float(A, "the activation")
    _check_rows(A, "the activation")
    _check_weight(CB, SCB)
    _check_inner(A, CB)
    _check_threshold(threshold)
    _check_bias(bias, CB.shape[0])
    if weight is not None and (weight.shape != CB.shape or not weight.is_floating_point()):
        raise ArgumentError(
            f"the unquantized weight is {weight.dtype} of shape {tuple(weight.shape)}",
            expected=f"floating point of shape {tuple(CB.shape)}",
        )


def _check_linear_dgrad(grad: Tensor, CB: Tensor, SCB: Tensor) -> None:
    check.check_float(grad, "the gradient")
    _check_rows(grad, "the gradient")
    _check_weight(CB, SCB)
    _check_inner(grad, CB, 0)


define(
    "int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    check=_check_quant,
    result=_quant,
)
define(
    "int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    check=_check_quant,
    result=_double_quant,
)
define(
    "int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor",
    check=_check_dequant,
    result=lambda A, stats: A.new_empty(A.shape, dtype=torch.float32),
)
define(
    "int8_linear_matmul(Tensor A, Tensor B) -> Tensor",
    check=_check_product,
    result=lambda A, B: A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32),
)
define(
    "int8_linear_matmul.out(Tensor A, Tensor B, *, Tensor(a!) out) -> ()",
    check=_check_product,
    result=lambda *_args, **_named: None,
)
define(
    "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) "
    "-> Tensor",
    check=_check_mm_dequant,
    result=lambda A, row_stats, col_stats, dtype=None, bias=None: A.new_empty(A.shape, dtype=dtype or torch.float16),
)
define(
    "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor",
    check=_check_scaled_mm,
    result=lambda A, B, row_stats, col_stats, bias=None, dtype=None: A.new_empty(
        (*A.shape[:-1], B.shape[0]), dtype=dtype or torch.float16
    ),
)
define(
    "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
    "Tensor? bias=None) -> (Tensor, Tensor?)",
    check=_check_mixed,
    result=_mixed,
)
define(
    "int8_linear(Tensor A, Tensor CB, Tensor SCB, float threshold=0.0, Tensor? bias=None, Tensor? weight=None) "
    "-> Tensor",
    check=_check_linear,
    result=lambda A, CB, *_rest, **_named: A.new_empty((*A.shape[:-1], CB.shape[0])),
)
define(
    "int8_linear_dgrad(Tensor grad, Tensor CB, Tensor SCB) -> Tensor",
    check=_check_linear_dgrad,
    result=lambda grad, CB, SCB: grad.new_empty((*grad.shape[:-1], CB.shape[1])),
)
