"""8-bit blockwise ops: codes of a rising 256-entry map, one absmax per block."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError
from halfbyte.formats import blocks
from halfbyte.ops import arguments as check
from halfbyte.ops.definition import define

__all__: list[str] = []


def _check_quantize(
    A: Tensor, code: Tensor, blocksize: int, *, out: Tensor | None = None, absmax: Tensor | None = None
) -> None:
    check.check_float(A, "the tensor to quantize")
    check.check_code(code, 256)
    blocks.check_blocksize_8bit(blocksize)
    if out is not None:
        check.check_out(out, torch.uint8, tuple(A.shape), A.device)
    if absmax is not None:
        check.check_out(absmax, torch.float32, (blocks.block_count(A.numel(), blocksize),), A.device)


def _quantize(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    del code
    absmax = A.new_empty((blocks.block_count(A.numel(), blocksize),), dtype=torch.float32)
    return A.new_empty(A.shape, dtype=torch.uint8), absmax


def _check_dequantize(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, *, out: Tensor | None = None
) -> None:
    check.check_code(code, 256)
    blocks.check_blocksize_8bit(blocksize)
    check.check_float_dtype(dtype)
    if A.dtype != torch.uint8:
        raise ArgumentError(f"codes are {A.dtype}", expected="uint8")
    check.check_absmax(absmax, A.numel(), blocksize)
    if out is not None:
        check.check_out(out, dtype, tuple(A.shape), A.device)


define(
    "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    check=_check_quantize,
    result=_quantize,
)
define(
    "quantize_blockwise.out(Tensor A, Tensor code, int blocksize, *, Tensor(a!) out, Tensor(b!) absmax) -> ()",
    check=_check_quantize,
    result=lambda *_args, **_named: None,
)
_DEQUANTIZE = "Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype"
define(
    f"dequantize_blockwise({_DEQUANTIZE}) -> Tensor",
    check=_check_dequantize,
    result=lambda A, absmax, code, blocksize, dtype: A.new_empty(A.shape, dtype=dtype),
)
define(
    f"dequantize_blockwise.out({_DEQUANTIZE}, *, Tensor(a!) out) -> ()",
    check=_check_dequantize,
    result=lambda *_args, **_named: None,
)
