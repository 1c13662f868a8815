"""Launchers of the 4-bit products: fused kernels for small batches, slices of dequantized weight and cuBLAS beyond."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from halfbyte.backends.registry import implements
from halfbyte.backends.triton import slices
from halfbyte.backends.triton.decoded import DecodedPlan, decoded_kernel
from halfbyte.backends.triton.dequantize import Nested, as_bytes, readable
from halfbyte.backends.triton.device import gpu_of, levels_of, rounded_pairs_of, words_of
from halfbyte.backends.triton.fused import FusedPlan, fused_kernels
from halfbyte.backends.triton.kernels.gemm_portable import _gemm_4bit_portable_kernel
from halfbyte.backends.triton.launch import ALIGNMENT, aligned, check_devices, dense, on_device, start
from halfbyte.backends.triton.tuning import (
    FUSED_BATCHES,
    backward_tile_for,
    closed_form,
    fused_up_to,
    tile_for,
)

__all__ = ["FusedPlan", "gemm_4bit", "gemm_4bit_dgrad", "gemv_4bit", "make_plan"]

PORTABLE_UP_TO = 16
"""Rows up to which the portable kernel beats slices."""


_plans: dict[tuple[Any, ...], FusedPlan | DecodedPlan | None] = {}
_backward_plans: dict[tuple[Any, ...], DecodedPlan | None] = {}
_UNPLANNED: Any = object()


def make_plan(
    m: int,
    n: int,
    k: int,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    index: int,
    x_stride: int,
    *,
    nested: bool,
    bias: bool,
) -> FusedPlan | DecodedPlan | None:
    """The fused plan of a product of ``m`` rows, None where slices or the portable kernel serve better or alone can."""
    gpu = gpu_of(index)
    if not gpu.gluon or not fused_kernels() or dtype == torch.float32 or k % 32 or n * k // 8 >= 1 << 31:
        return None
    if m > fused_up_to(gpu, n, k):
        return None
    batch = next((size for size in FUSED_BATCHES if size >= m), FUSED_BATCHES[-1])
    tile = tile_for(gpu, batch, n, k)
    if tile.kind in ("warpgroup", "decoded") and (k % 64 or k % blocksize or blocksize < 64):
        if m > 64:
            return None
        tile = closed_form(replace(gpu, arch="other"), min(batch, 64), n, k)
    if tile.kind == "decoded":
        if decoded_kernel() is None:
            return None
        return DecodedPlan(m, n, k, blocksize, quant_type, tile, across=False, nested=nested, bias=bias)
    pairs, words = rounded_pairs_of(quant_type, dtype, index), words_of(quant_type, dtype)
    return FusedPlan(m, n, k, blocksize, pairs, words, tile, x_stride, nested=nested, bias=bias)


def _realigned(tensor: Tensor | None) -> Tensor | None:
    """A small tensor where the compiled kernel expects it: views of packed state may begin anywhere."""
    return tensor if tensor is None or tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _key(
    A: Tensor, B: Tensor, rows: int, n: int, k: int, x_stride: int, blocksize: int, quant_type: str, nested: bool,
    bias: bool,
) -> tuple[Any, ...]:  # fmt: skip
    return (rows, n, k, x_stride, blocksize, quant_type, A.dtype, B.dtype, A.device.index, nested, bias)


def _prepare(
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
) -> Callable[[Tensor], Tensor | None] | None:
    """The product with contiguous activations of A's shape, dtype and device, while the other tensors stay in place."""
    n, k = shapeB
    if not A.numel() or not k:
        return None
    rows = A.numel() // k
    nested = (absmax_8bit, absmax_code, absmax_offset)
    if not _in_place(B, absmax, nested, bias):
        return None
    key = _key(A, B, rows, n, k, k, blocksize, quant_type, absmax_8bit is not None, bias is not None)
    plan = _plans.get(key, _UNPLANNED)
    if isinstance(plan, (FusedPlan, DecodedPlan)) and k % 8 == 0:
        return plan.repeated(B, absmax, nested, bias, (*A.shape[:-1], n), A.device.index)
    if plan is None and rows > PORTABLE_UP_TO and k % 8 == 0:
        return slices.repeated(B, absmax, nested, blocksize, quant_type, (n, k), A.dtype, bias, across=False)
    return None


def _in_place(B: Tensor, absmax: Tensor, nested: Nested, bias: Tensor | None = None) -> bool:
    """Whether kernels read these very tensors: none of them is copied, cast or aligned first."""
    tensors = [tensor for tensor in (B, absmax, *nested, bias) if tensor is not None]
    offset_fits = nested[2] is None or nested[2].dtype == torch.float32
    return offset_fits and all(tensor.is_contiguous() for tensor in tensors) and aligned(*tensors)


@implements("triton", "gemm_4bit", prepare=_prepare)
def gemm_4bit(
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
) -> Tensor:
    """``A @ weight.T + bias``: codes are decoded inside the product for small batches, slice by slice for large
    ones."""
    n, k = shapeB
    rows = A.numel() // k if k else math.prod(A.shape[:-1])
    out = torch.empty((*A.shape[:-1], n), dtype=A.dtype, device=A.device)
    if not out.numel():
        return out
    if not k:
        return out.zero_() if bias is None else out.copy_(bias)
    # One row may have any stride: it is never used.
    x = A if A.dim() == 2 else A.reshape(rows, k)
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % ALIGNMENT:
        x = x.clone(memory_format=torch.contiguous_format)
    x_stride = k if rows == 1 else x.stride(0)
    index = A.device.index
    key = _key(A, B, rows, n, k, x_stride, blocksize, quant_type, absmax_8bit is not None, bias is not None)
    if key in _plans:
        plan = _plans[key]
    else:
        plan = _plans[key] = make_plan(
            rows, n, k, blocksize, quant_type, A.dtype, index, x_stride,
            nested=absmax_8bit is not None, bias=bias is not None,
        )  # fmt: skip
    nested = readable((absmax_8bit, absmax_code, absmax_offset))
    packed, absmax, bias = dense(B), dense(absmax), dense(bias)
    check_devices("weight", "layer", packed, absmax, *nested, bias)
    with on_device(index):
        if plan is not None and packed.data_ptr() % ALIGNMENT == 0:
            if not aligned(absmax, *nested, bias):
                absmax = absmax if aligned(absmax) else absmax.clone()
                nested = (_realigned(nested[0]), _realigned(nested[1]), _realigned(nested[2]))
                bias = _realigned(bias)
            plan.run(x, packed, absmax, nested, bias, out, index)
        elif rows <= PORTABLE_UP_TO:
            levels = levels_of(quant_type, index)
            portable(x, as_bytes(packed), absmax, nested, blocksize, levels, bias, out.view(rows, n))
        else:
            slices.forward(x, as_bytes(packed), absmax, nested, blocksize, quant_type, bias, out.view(rows, n))
    return out


def portable(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: Nested,
    blocksize: int,
    levels: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """``out = x @ weight.T + bias`` by the plain-Triton kernel, for any shape and dtype."""
    (m, k), n = x.shape, out.shape[1]
    precise = x.dtype == torch.float32
    rows, columns, depth = 16, 32 if precise else 64, 32 if precise else 64
    start(
        _gemm_4bit_portable_kernel,
        (-(-n // columns), -(-m // rows)),
        packed,
        x,
        absmax,
        *nested,
        levels,
        bias,
        out,
        m,
        n,
        k,
        x.stride(0),
        rows,
        columns,
        depth,
        blocksize,
        nested[0] is not None,
        bias is not None,
        precise,
        num_warps=4,
    )


def make_backward_plan(
    m: int, n: int, k: int, blocksize: int, quant_type: str, dtype: torch.dtype, index: int, *, nested: bool
) -> DecodedPlan | None:
    """The fused plan of ``grad @ weight``, None where slices serve better or alone can."""
    gpu = gpu_of(index)
    usable = gpu.gluon and dtype != torch.float32 and not (k % 64 or k % blocksize or blocksize < 64 or n % 8)
    tile = backward_tile_for(gpu, m, n, k) if usable and n * k // 8 < 1 << 31 else None
    if tile is None or decoded_kernel() is None:
        return None
    return DecodedPlan(m, n, k, blocksize, quant_type, tile, across=True, nested=nested, bias=False)


def _backward_key(
    grad: Tensor, m: int, n: int, k: int, blocksize: int, quant_type: str, absmax_8bit: Tensor | None
) -> tuple[Any, ...]:
    return (m, n, k, blocksize, quant_type, grad.dtype, grad.device.index, absmax_8bit is None)


def _prepare_dgrad(
    grad: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Callable[[Tensor], Tensor | None] | None:
    """The product with contiguous gradients of ``grad``'s shape, dtype and device, as :func:`_prepare`."""
    n, k = shapeB
    if not grad.numel() or not k or n % 8:
        return None
    nested = (absmax_8bit, absmax_code, absmax_offset)
    key = _backward_key(grad, grad.numel() // n, n, k, blocksize, quant_type, absmax_8bit)
    plan = _backward_plans.get(key, _UNPLANNED)
    if plan is _UNPLANNED or not _in_place(B, absmax, nested):
        return None
    if plan is not None:
        return plan.repeated(B, absmax, nested, None, (*grad.shape[:-1], k), grad.device.index)
    return slices.repeated(B, absmax, nested, blocksize, quant_type, (n, k), grad.dtype, across=True)


@implements("triton", "gemm_4bit_dgrad", prepare=_prepare_dgrad)
def gemm_4bit_dgrad(
    grad: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """``grad @ weight``: the weight is decoded inside the product, or dequantized slice by slice."""
    n, k = shapeB
    out = torch.empty((*grad.shape[:-1], k), dtype=grad.dtype, device=grad.device)
    if not out.numel():
        return out
    if not n:
        return out.zero_()
    nested = readable((absmax_8bit, absmax_code, absmax_offset))
    rows = grad.reshape(-1, n)
    if rows.stride(1) != 1 or rows.stride(0) % 8 or rows.data_ptr() % ALIGNMENT:
        rows = rows.clone(memory_format=torch.contiguous_format)
    index = grad.device.index
    m = rows.shape[0]
    key = _backward_key(grad, m, n, k, blocksize, quant_type, absmax_8bit)
    if key in _backward_plans:
        plan = _backward_plans[key]
    else:
        plan = _backward_plans[key] = make_backward_plan(
            m, n, k, blocksize, quant_type, grad.dtype, index, nested=absmax_8bit is not None
        )
    packed, absmax = as_bytes(B), dense(absmax)
    check_devices("weight", "layer", packed, absmax, *nested)
    with on_device(index):
        if plan is not None and aligned(packed, absmax, *nested):
            plan.run(rows, packed, absmax, nested, None, out, index)
        else:
            slices.backward(rows, packed, absmax, nested, blocksize, quant_type, out.view(-1, k))
    return out


def _gemv(A: Tensor, B: Tensor, n: int, absmax: Tensor, code: Tensor, blocksize: int, out: Tensor) -> None:
    if not out.numel():
        return
    x = A.reshape(-1, A.shape[-1])
    if not A.shape[-1]:
        out.zero_()
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    with on_device(A.device.index):
        portable(x, as_bytes(B), dense(absmax), (None, None, None), blocksize, dense(code), None, out.view(-1, n))


@implements("triton", "gemv_4bit")
def gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """``A @ weight.T`` with the 16 levels given as a tensor."""
    out = torch.empty((*A.shape[:-1], shapeB[0]), dtype=A.dtype, device=A.device)
    _gemv(A, B, shapeB[0], absmax, code, blocksize, out)
    return out


@implements("triton", "gemv_4bit.out")
def gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor
) -> None:
    """:func:`gemv_4bit` into ``out``."""
    if out.is_contiguous():
        _gemv(A, B, shapeB[0], absmax, code, blocksize, out)
    else:
        out.copy_(gemv_4bit(A, B, shapeB, absmax, code, blocksize))
