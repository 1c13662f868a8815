"""Products of many rows with one of many packed 4-bit matrices each: the experts of a mixture-of-experts layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError
from halfbyte.ops import arguments as check
from halfbyte.ops.definition import define

__all__: list[str] = []


def _check_group(experts: Tensor, count: int) -> None:
    if experts.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"expert numbers are {experts.dtype}", expected="int64 or int32", hint="use .long()")
    if count < 1:
        raise ArgumentError(f"{count} experts", expected="one or more")


def _group(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return experts.new_empty((experts.numel(),), dtype=torch.int32), experts.new_empty((count,), dtype=torch.int32)


def _check_gemm(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    order: Tensor,
    ends: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    transposed: bool = False,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> None:
    check.check_float(A, "the activation")
    check.check_format_4bit(quant_type, blocksize)
    if len(shapeB) != 3:
        raise ArgumentError(f"the weight's shape is {tuple(shapeB)}", expected="three dimensions, experts first")
    count, rows, columns = shapeB
    if rows * columns % blocksize:
        raise ArgumentError(
            f"experts of {rows}x{columns} values in blocks of {blocksize}", expected="whole blocks for each expert"
        )
    width, result = (rows, columns) if transposed else (columns, rows)
    if A.dim() != 2 or A.shape[1] != width:
        raise ArgumentError(
            f"activation of shape {tuple(A.shape)} times experts of shape {tuple(shapeB)}", expected=f"(rows, {width})"
        )
    for name, tensor, length in (("order", order, None), ("ends", ends, count)):
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or (length is not None and tensor.numel() != length):
            raise ArgumentError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}", expected="the result of group_rows")
    if order.numel() and (not A.shape[0] or order.numel() % A.shape[0]):
        raise ArgumentError(f"{order.numel()} products of {A.shape[0]} rows", expected="the same number for every row")
    check.check_packed(B, math.prod(shapeB))
    check.check_absmax(absmax, math.prod(shapeB), blocksize, absmax_8bit, absmax_code, absmax_offset)
    if bias is not None and (bias.shape != (count, result) or bias.dtype != A.dtype):
        raise ArgumentError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}", expected=f"{A.dtype} of shape ({count}, {result})"
        )


def _gemm(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    order: Tensor,
    ends: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    transposed: bool = False,
    *_rest: Tensor | None,
    **_named: Tensor | None,
) -> Tensor:
    return A.new_empty((order.numel(), shapeB[2] if transposed else shapeB[1]))


# Which products each expert has: those numbered order[ends[e - 1]:ends[e]]. Numbers of experts that there are not are
# at the end of order, behind ends[-1]: they stand for products that another device computes.
define("group_rows(Tensor experts, int count) -> (Tensor, Tensor)", check=_check_group, result=_group)
# Product s is A[s // (order.numel() // rows of A)] @ weight[expert of s].T + bias[expert of s], without .T where
# transposed; zeros where it has no expert.
define(
    "gemm_4bit_grouped(Tensor A, Tensor B, SymInt[] shapeB, Tensor order, Tensor ends, Tensor absmax, int blocksize, "
    "str quant_type, bool transposed=False, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    check=_check_gemm,
    result=_gemm,
)
