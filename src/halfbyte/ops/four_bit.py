"""4-bit ops: quantize, dequantize, matmul and its gradient, on packed codes with plain or nested absmax.

Nested (double-quantized) absmax comes as four tensors. Where ``absmax_8bit`` is given, ``absmax`` holds the second
level (fp32, one per 256 blocks) and the absmax of block ``b`` is
``absmax_code[absmax_8bit[b]] * absmax[b // 256] + absmax_offset``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError
from halfbyte.formats import blocks
from halfbyte.ops import arguments as check
from halfbyte.ops.definition import define

__all__: list[str] = []

_NESTED = "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None"


def _check_quantize(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> None:
    check.check_float(A, "the tensor to quantize")
    check.check_format_4bit(quant_type, blocksize)
    check.check_storage_dtype(quant_storage)
    blocks.packed_rows(A.numel(), quant_storage.itemsize)


def _quantize(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = blocks.packed_rows(A.numel(), quant_storage.itemsize)
    absmax = A.new_empty((blocks.block_count(A.numel(), blocksize),), dtype=torch.float32)
    return A.new_empty((rows, 1), dtype=quant_storage), absmax


def _check_dequantize(
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
    out: Tensor | None = None,
) -> None:
    check.check_format_4bit(quant_type, blocksize)
    check.check_float_dtype(dtype)
    numel = math.prod(shape)
    check.check_packed(A, numel)
    check.check_absmax(absmax, numel, blocksize, absmax_8bit, absmax_code, absmax_offset)
    if out is not None:
        check.check_out(out, dtype, tuple(shape), A.device)


def _check_product(A: Tensor, B: Tensor, shapeB: Sequence[int], contracted: int) -> None:
    check.check_float(A, "the activation")
    if len(shapeB) != 2:
        raise ArgumentError(f"the weight's shape is {tuple(shapeB)}", expected="two dimensions, (out, in)")
    if A.dim() == 0 or A.shape[-1] != shapeB[contracted]:
        raise ArgumentError(
            f"activation of shape {tuple(A.shape)} times weight of shape {tuple(shapeB)}",
            expected=f"{shapeB[contracted]} as the activation's last dimension",
        )
    check.check_packed(B, math.prod(shapeB))


def _check_gemm(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> None:
    check.check_format_4bit(quant_type, blocksize)
    _check_product(A, B, shapeB, 1)
    check.check_absmax(absmax, math.prod(shapeB), blocksize, absmax_8bit, absmax_code, absmax_offset)
    if bias is not None and (bias.shape != (shapeB[0],) or bias.dtype != A.dtype):
        raise ArgumentError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}", expected=f"{A.dtype} of shape ({shapeB[0]},)"
        )


def _check_dgrad(
    grad: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> None:
    check.check_format_4bit(quant_type, blocksize)
    _check_product(grad, B, shapeB, 0)
    check.check_absmax(absmax, math.prod(shapeB), blocksize, absmax_8bit, absmax_code, absmax_offset)


def _check_gemv(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    *,
    out: Tensor | None = None,
) -> None:
    blocks.check_blocksize_4bit(blocksize)
    _check_product(A, B, shapeB, 1)
    check.check_absmax(absmax, math.prod(shapeB), blocksize)
    check.check_code(code, 16)
    if out is not None:
        check.check_out(out, A.dtype, (*A.shape[:-1], shapeB[0]), A.device)


define(
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    check=_check_quantize,
    result=_quantize,
)
_DEQUANTIZE = f"Tensor A, Tensor absmax, int blocksize, str quant_type, SymInt[] shape, ScalarType dtype, {_NESTED}"
define(
    f"dequantize_4bit({_DEQUANTIZE}) -> Tensor",
    check=_check_dequantize,
    result=lambda A, absmax, blocksize, quant_type, shape, dtype, *_nested, **_named: A.new_empty(shape, dtype=dtype),
)
define(
    f"dequantize_4bit.out({_DEQUANTIZE}, *, Tensor(a!) out) -> ()",
    check=_check_dequantize,
    result=lambda *_args, **_named: None,
)
define(
    "gemm_4bit(Tensor A, Tensor B, SymInt[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    f"Tensor? bias=None, {_NESTED}) -> Tensor",
    check=_check_gemm,
    result=lambda A, B, shapeB, *_rest, **_named: A.new_empty((*A.shape[:-1], shapeB[0])),
)
define(
    "gemm_4bit_dgrad(Tensor grad, Tensor B, SymInt[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    f"{_NESTED}) -> Tensor",
    check=_check_dgrad,
    result=lambda grad, B, shapeB, *_rest, **_named: grad.new_empty((*grad.shape[:-1], shapeB[1])),
)
_GEMV = "Tensor A, Tensor B, SymInt[] shapeB, Tensor absmax, Tensor code, int blocksize"
define(
    f"gemv_4bit({_GEMV}) -> Tensor",
    check=_check_gemv,
    result=lambda A, B, shapeB, *_rest: A.new_empty((*A.shape[:-1], shapeB[0])),
)
define(f"gemv_4bit.out({_GEMV}, *, Tensor(a!) out) -> ()", check=_check_gemv, result=lambda *_args, **_named: None)
