"""LLM.int8() on GPUs: no step waits for the GPU, so the whole can be captured in a CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.backends.registry import implements
from halfbyte.backends.triton.device import gpu_of
from halfbyte.backends.triton.int8_plan import Plan, RowPlan, make_plan, product, quantize
from halfbyte.backends.triton.kernels.int8 import _int8_dequantize_kernel
from halfbyte.backends.triton.launch import Launcher, aligned, dense, on_device, raw_stream, start
from halfbyte.backends.triton.slices import slice_rows
from halfbyte.errors import ArgumentError
from halfbyte.formats import int8

__all__ = ["int8_linear", "int8_linear_dgrad", "int8_linear_matmul", "int8_scaled_mm", "int8_vectorwise_quant"]

OLDEST = 80
"""The oldest NVIDIA compute capability, times ten, on which Triton multiplies int8 on tensor cores."""


@functools.lru_cache(maxsize=64)
def _too_old(index: int) -> bool:
    arch = gpu_of(index).arch
    return arch.startswith("sm_") and int(arch[3:]) < OLDEST


def _unfit(A: Tensor, B: Tensor) -> str | None:
    if A.numel() == 0 or B.numel() == 0:
        return "an empty tensor"
    if A.shape[-1] > int8.EXACT_INT32_TERMS:
        return f"rows of more than {int8.EXACT_INT32_TERMS} codes, whose sums int32 cannot hold"
    if _too_old(A.device.index):
        return "int8 tensor cores before compute capability 8.0"
    return None


def _matrix(A: Tensor) -> Tensor:
    """``A`` as a matrix whose rows are contiguous."""
    rows = A if A.dim() == 2 else A.reshape(A.shape[:-1].numel(), A.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _declines_quant(A: Tensor, threshold: float = 0.0) -> str | None:
    return "the list of outlier columns, whose length only the GPU knows" if threshold else _unfit(A, A)


@implements("triton", "int8_vectorwise_quant", declines=_declines_quant)
def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, None]:
    """Codes of A's shape and fp32 absmax ``(rows,)``."""
    with on_device(A.device.index):
        codes, absmax = quantize(_matrix(A.detach()))
    return codes.view(A.shape), absmax, None


@implements("triton", "int8_linear_matmul", declines=_unfit)
def int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    """``A @ B.T`` as exact int32."""
    out = torch.empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32, device=A.device)
    with on_device(A.device.index):
        product(_matrix(A).contiguous(), B.contiguous(), out.view(-1, B.shape[0]), None, None, None)
    return out


def _declines_scaled(A: Tensor, B: Tensor, *_rest: object, **_named: object) -> str | None:
    return _unfit(A, B)


@implements("triton", "int8_scaled_mm", declines=_declines_scaled)
def int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Product of two quantized matrices, ``A @ B.T + bias``, in ``dtype`` (None: fp16)."""
    out = torch.empty((*A.shape[:-1], B.shape[0]), dtype=dtype or torch.float16, device=A.device)
    scales = row_stats.detach().contiguous(), col_stats.detach().contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    with on_device(A.device.index):
        product(_matrix(A).contiguous(), B.contiguous(), out.view(-1, B.shape[0]), bias, *scales)
    return out


def _declines_linear(
    A: Tensor,
    CB: Tensor,
    SCB: Tensor,
    threshold: float = 0.0,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
) -> str | None:
    if threshold and weight is not None and weight.dtype != A.dtype:
        return f"an unquantized weight of {weight.dtype} beside activations of {A.dtype}"
    return _unfit(A, CB)


def _check_devices(A: Tensor, *tensors: Tensor | None) -> None:
    """Refuse tensors that A's GPU cannot read: a compiled kernel gets addresses, and would end the use of the GPU."""
    for tensor in tensors:
        if tensor is not None and tensor.device != A.device:
            raise ArgumentError(
                f"a tensor of the 8-bit layer is on {tensor.device}",
                expected=f"{A.device}, where the activation is",
                hint="move the layer, not its tensors: layer.to(device) takes the scales along",
            )


_plans: dict[tuple[Any, ...], Plan | RowPlan] = {}


def _key(
    A: Tensor, CB: Tensor, rows: int, x_stride: int, threshold: float, bias: Tensor | None, full: Tensor | None
) -> tuple[Any, ...]:
    n, k = CB.shape
    kind = None if bias is None else bias.dtype
    return (rows, n, k, x_stride, A.dtype, A.device.index, threshold > 0, full is None, kind)


def _prepare(
    A: Tensor, CB: Tensor, SCB: Tensor, threshold: float, bias: Tensor | None
) -> Callable[[Tensor], Tensor | None] | None:
    """The product with contiguous activations of A's shape, dtype and device, while the other tensors stay in place."""
    n, k = CB.shape
    tensors = [tensor for tensor in (CB, SCB, bias) if tensor is not None]
    if not A.numel() or not all(tensor.is_contiguous() for tensor in tensors) or not aligned(*tensors):
        return None
    plan = _plans.get(_key(A, CB, A.numel() // k, k, threshold, bias, None))
    return None if plan is None else plan.repeated(CB, SCB, float(threshold), bias, (*A.shape[:-1], n))


@implements("triton", "int8_linear", declines=_declines_linear, prepare=_prepare)
def int8_linear(
    A: Tensor,
    CB: Tensor,
    SCB: Tensor,
    threshold: float = 0.0,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """LLM.int8() of every row by itself, without a step that waits for the GPU."""
    _check_devices(A, CB, SCB, bias, weight)
    n, k = CB.shape
    rows = A.numel() // k
    index = A.device.index
    threshold = float(threshold)  # a whole number would be compiled in as one, for all that share the plan
    out = torch.empty((*A.shape[:-1], n), dtype=A.dtype, device=A.device)
    # One row may have any shape and stride: it is its own matrix.
    x = A if rows == 1 and A.stride(-1) == 1 else _matrix(A)
    x_stride = k if rows == 1 else x.stride(0)
    full = weight if threshold else None
    key = _key(A, CB, rows, x_stride, threshold, bias, full)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = make_plan(
            rows, n, k, x_stride, A.dtype, index, split=threshold > 0, full=full is not None, bias=bias is not None
        )
    with on_device(index):
        plan.run(x, dense(CB), dense(SCB), threshold, dense(bias), dense(full), out)
    return out


_dequantizers: dict[tuple[Any, ...], Launcher] = {}
_BLOCKS = (int8.STEP, 16, 512)


def _declines_dgrad(grad: Tensor, CB: Tensor, SCB: Tensor) -> str | None:
    return "an empty tensor" if grad.numel() == 0 or CB.numel() == 0 else None


@implements("triton", "int8_linear_dgrad", declines=_declines_dgrad)
def int8_linear_dgrad(grad: Tensor, CB: Tensor, SCB: Tensor) -> Tensor:
    """``grad @ weight``: slices of the weight's columns, dequantized into memory that every slice uses again."""
    n, k = CB.shape
    rows, index = _matrix(grad), grad.device.index
    _check_devices(grad, CB, SCB)
    weight, scales = dense(CB), dense(SCB)
    out = torch.empty((*grad.shape[:-1], k), dtype=grad.dtype, device=grad.device)
    flat = out.view(-1, k)
    count = slice_rows(k, n * grad.element_size(), 8) if k % 8 == 0 else k
    workspace = torch.empty(n * count, dtype=grad.dtype, device=grad.device)
    with on_device(index):
        if count == k and aligned(weight, scales):
            key = (n, k, grad.dtype, index)
            launcher = _dequantizers.get(key)
            if launcher is None:
                launcher = _dequantizers[key] = Launcher(_int8_dequantize_kernel, _BLOCKS)
            grid = (*_grid(n, k), 1)
            if launcher.compiled():
                places = weight.data_ptr(), scales.data_ptr(), workspace.data_ptr()
                launcher.direct(grid, raw_stream(index), *places, n, k, 0, k)
            else:
                launcher.ordinary(grid, weight, scales, workspace, n, k, 0, k)
            torch.mm(rows, workspace.view(n, k), out=flat)
            return out
        for first in range(0, k, count):
            columns = min(k - first, count)
            part = workspace[: n * columns].view(n, columns)
            start(_int8_dequantize_kernel, _grid(n, columns), weight, scales, part, n, k, first, columns, *_BLOCKS)
            torch.mm(rows, part, out=flat[:, first : first + columns])
    return out


def _grid(n: int, columns: int) -> tuple[int, int]:
    return -(-n // _BLOCKS[1]), -(-columns // _BLOCKS[2])
