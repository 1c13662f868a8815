"""Launchers of LLM.int8(): no step waits for the GPU, so the whole can be captured in a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from halfbyte.backends.registry import implements
from halfbyte.backends.triton.kernels.int8 import _int8_columns_kernel, _int8_product_kernel, _int8_rows_kernel
from halfbyte.backends.triton.launch import on_device, start
from halfbyte.formats import int8

__all__ = ["Tile", "int8_linear", "int8_linear_matmul", "int8_scaled_mm", "int8_vectorwise_quant", "tile_for"]

OLDEST = (8, 0)
"""The oldest NVIDIA compute capability on which Triton multiplies int8 on tensor cores."""

COMPACT = 1024
"""Columns that the one program which lists outliers looks at in one step."""


@dataclass(frozen=True)
class Tile:
    """Edges of a product's tile, rows of tiles that share weights, warps and pipeline stages."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int


@dataclass(frozen=True)
class _Outliers:
    x: Tensor
    columns: Tensor
    count: Tensor
    threshold: float
    full: Tensor | None


def tile_for(batch: int, fp32: bool = False) -> Tile:
    """The tile for that many rows. Untuned.

    >>> tile_for(1).m, tile_for(4096).m
    (16, 128)
    """
    if batch <= 16:
        return Tile(16, 64, 256, 1, 4, 3)
    if batch <= 64 or fp32:
        return Tile(64, 64, 128, 4, 4, 3)
    if batch <= 512:
        return Tile(64, 128, 128, 8, 4, 4)
    return Tile(128, 128, 128, 8, 8, 3)


def _unfit(A: Tensor, *others: Tensor) -> str | None:
    if any(tensor.numel() == 0 for tensor in (A, *others)):
        return "an empty tensor"
    if torch.version.hip is None and torch.cuda.get_device_capability(A.device) < OLDEST:
        return "int8 tensor cores before compute capability 8.0"
    return None


def _matrix(A: Tensor) -> Tensor:
    """``A`` as a matrix whose rows are contiguous."""
    rows = A.detach().reshape(A.shape[:-1].numel(), A.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _quantize(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes, fp32 absmax, and int32 flags of outlier columns (untouched without a threshold)."""
    rows, columns = x.shape
    codes = torch.empty((rows, columns), dtype=torch.int8, device=x.device)
    absmax = torch.empty(rows, dtype=torch.float32, device=x.device)
    flags = torch.zeros(columns if threshold else 1, dtype=torch.int32, device=x.device)
    block = max(128, min(4096, triton.next_power_of_2(columns)))
    start(
        _int8_rows_kernel,
        (rows,),
        x,
        codes,
        absmax,
        flags,
        threshold,
        columns,
        x.stride(0),
        threshold > 0,
        block,
        num_warps=8 if block >= 2048 else 4,
        enable_fp_fusion=False,
    )
    return codes, absmax, flags


def _product(
    codes: Tensor,
    CB: Tensor,
    out: Tensor,
    bias: Tensor | None,
    row_absmax: Tensor | None,
    column_absmax: Tensor | None,
    outliers: _Outliers | None = None,
) -> None:
    """Fill contiguous ``out``, ``(M, N)``."""
    weight = CB.detach().contiguous()
    (rows, columns), count = codes.shape, weight.shape[0]
    tile = tile_for(rows, outliers is not None and outliers.x.dtype == torch.float32)
    grid = (triton.cdiv(rows, tile.m) * triton.cdiv(count, tile.n),)
    full = None if outliers is None else outliers.full
    start(
        _int8_product_kernel,
        grid,
        codes,
        weight,
        out,
        None if bias is None else bias.detach().contiguous(),
        row_absmax,
        column_absmax,
        None if outliers is None else outliers.x,
        full,
        None if outliers is None else outliers.columns,
        None if outliers is None else outliers.count,
        0.0 if outliers is None else outliers.threshold,
        rows,
        count,
        columns,
        columns if outliers is None else outliers.x.stride(0),
        int8.STEP,
        int8.STEP_SQUARED,
        tile.m,
        tile.n,
        tile.k,
        16,
        tile.group,
        out.dtype == torch.int32,
        outliers is not None,
        full is not None,
        bias is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _declines_quant(A: Tensor, threshold: float = 0.0) -> str | None:
    return "the list of outlier columns, whose length only the GPU knows" if threshold else _unfit(A)


@implements("triton", "int8_vectorwise_quant", declines=_declines_quant)
def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, None]:
    """Codes of A's shape and fp32 absmax ``(rows,)``."""
    with on_device(A.device.index):
        codes, absmax, _ = _quantize(_matrix(A), threshold)
    return codes.view(A.shape), absmax, None


@implements("triton", "int8_linear_matmul", declines=_unfit)
def int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    """``A @ B.T`` as exact int32."""
    out = torch.empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32, device=A.device)
    with on_device(A.device.index):
        _product(_matrix(A).contiguous(), B, out.view(-1, B.shape[0]), None, None, None)
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
    with on_device(A.device.index):
        _product(_matrix(A).contiguous(), B, out.view(-1, B.shape[0]), bias, *scales)
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


@implements("triton", "int8_linear", declines=_declines_linear)
def int8_linear(
    A: Tensor,
    CB: Tensor,
    SCB: Tensor,
    threshold: float = 0.0,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """LLM.int8() of every row by itself, without a step that waits for the GPU."""
    x = _matrix(A)
    out = torch.empty((*A.shape[:-1], CB.shape[0]), dtype=A.dtype, device=A.device)
    with on_device(A.device.index):
        codes, absmax, flags = _quantize(x, threshold)
        outliers = None
        if threshold:
            columns, count = torch.empty_like(flags), torch.empty(1, dtype=torch.int32, device=A.device)
            start(_int8_columns_kernel, (1,), flags, columns, count, x.shape[1], COMPACT, num_warps=4)
            full = None if weight is None else weight.detach().contiguous()
            outliers = _Outliers(x, columns, count, threshold, full)
        _product(codes, CB, out.view(-1, CB.shape[0]), bias, absmax, SCB.detach().contiguous(), outliers)
    return out
