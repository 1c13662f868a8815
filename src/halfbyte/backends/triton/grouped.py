"""Launchers of the products with many experts: rows sorted by expert, one launch for all experts."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from halfbyte.backends.registry import implements
from halfbyte.backends.triton import grouped_tiles
from halfbyte.backends.triton.dequantize import as_bytes, offset_fp32
from halfbyte.backends.triton.device import gpu_of, levels_of, rounded_pairs_of
from halfbyte.backends.triton.kernels.grouped import _gemm_4bit_grouped_portable_kernel, _group_rows_kernel
from halfbyte.backends.triton.launch import on_device, start
from halfbyte.errors import ArgumentError

__all__ = ["gemm_4bit_grouped", "group_rows", "tile_bound"]

COUNTED_ROWS = 4096
"""Rows up to which one launch sorts them by counting; beyond, torch sorts."""


def tile_bound(rows: int, count: int, batch: int) -> int:
    """Tiles of up to ``batch`` rows that ``rows`` rows of ``count`` experts and of none can make at most.

    >>> tile_bound(8, 128, 8), tile_bound(512, 128, 8), tile_bound(4096, 8, 128)
    (8, 193, 41)
    """
    return min(rows, count + 1 + rows // batch)


@functools.lru_cache(maxsize=1)
def fused_kernel() -> Any:
    """The Gluon kernel; None, with a warning, where this Triton's Gluon is another one."""
    try:
        from halfbyte.backends.triton.kernels.gemm_grouped import _gemm_4bit_grouped_kernel
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"Triton {triton.__version__} has no Gluon that halfbyte knows ({error}); 4-bit experts are slower",
            stacklevel=2,
        )
        return None
    return _gemm_4bit_grouped_kernel


@implements("triton", "group_rows")
def group_rows(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Numbers of the rows sorted by expert, and where each expert's end; nothing waits for the GPU."""
    flat = experts.reshape(-1).contiguous()
    rows = flat.numel()
    if rows > COUNTED_ROWS:
        keys = torch.where((flat < 0) | (flat >= count), count, flat)
        keys, order = torch.sort(keys, stable=True)
        each = torch.arange(count, device=flat.device, dtype=flat.dtype)
        return order.int(), torch.searchsorted(keys, each, right=True, out_int32=True)
    order = torch.empty(rows, dtype=torch.int32, device=flat.device)
    ends = torch.empty(count, dtype=torch.int32, device=flat.device)
    mine, others = 32, 128
    row_programs = -(-rows // mine)
    with on_device(flat.device.index):
        start(
            _group_rows_kernel,
            (row_programs + -(-count // mine),),
            flat,
            order,
            ends,
            rows,
            count,
            row_programs,
            mine,
            others,
            num_warps=4,
        )
    return order, ends


@implements("triton", "gemm_4bit_grouped")
def gemm_4bit_grouped(
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
) -> Tensor:
    """Every row times its expert's weight, which is decoded inside the product."""
    count = shapeB[0]
    n, k = (shapeB[2], shapeB[1]) if transposed else (shapeB[1], shapeB[2])
    rows = order.numel()
    out = torch.empty((rows, n), dtype=A.dtype, device=A.device)
    if not out.numel():
        return out
    for tensor in (B, order, ends, absmax):
        if not tensor.is_cuda:
            raise ArgumentError(
                f"a tensor of the 4-bit experts is on {tensor.device}",
                expected="all on the activation's GPU",
                hint="move the module, not its tensors: module.to(device) takes the quant_state along",
            )
    x = A if A.stride(1) == 1 and A.stride(0) % 8 == 0 and A.data_ptr() % 16 == 0 else A.clone()
    nested = offset_fp32((absmax_8bit, absmax_code, absmax_offset))
    repeat = rows // A.shape[0]
    packed = as_bytes(B)
    fits = not transposed and k % 64 == 0 and k % blocksize == 0 and blocksize >= 64 and A.dtype != torch.float32
    fits = fits and packed.data_ptr() % 16 == 0 and math.prod(shapeB) // blocksize < 1 << 31
    fits = fits and n * k // 8 < 1 << 31 and k // 64 >= 2
    with on_device(A.device.index):
        gpu = gpu_of(A.device.index)
        if fits and gpu.gluon and fused_kernel() is not None:
            tile = grouped_tiles.tile_for(gpu, rows, count, n, k)
            pairs = rounded_pairs_of(quant_type, A.dtype, A.device.index)
            launch(tile, x, packed, absmax, nested, order, ends, bias, out, pairs, count, repeat, blocksize)
        else:
            levels = levels_of(quant_type, A.device.index)
            _portable(x, packed, absmax, nested, order, ends, bias, out, levels, count, repeat, blocksize, transposed)
    return out


def launch(
    tile: grouped_tiles.GroupedTile,
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: Any,
    order: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    out: Tensor,
    pairs: Tensor,
    count: int,
    repeat: int,
    blocksize: int,
) -> None:
    """``out`` by the Gluon kernel with that tile."""
    rows, n = out.shape
    k = x.shape[1]
    groups, per_block = k // 64, blocksize // 64
    unroll = tile.unroll
    per_slice = -(-groups // (tile.k_warps * unroll)) * unroll
    start(
        fused_kernel(),
        (tile_bound(rows, count, tile.batch), -(-n // tile.rows)),
        packed, x, order, ends, absmax, *nested, bias, out, pairs,
        rows, count, repeat, n, k // 8, k // blocksize, x.stride(0), groups, per_slice,
        triton.next_power_of_2(max(32, count + 1)), tile.rows, tile.batch, 2, unroll, min(per_block, unroll),
        per_block, tile.k_warps, tile.n_warps, groups == per_slice * tile.k_warps, nested[0] is not None,
        bias is not None, tile.ahead,
        num_warps=tile.k_warps * tile.n_warps,
    )  # fmt: skip


def _portable(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: Any,
    order: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    out: Tensor,
    levels: Tensor,
    count: int,
    repeat: int,
    blocksize: int,
    transposed: bool,
) -> None:
    rows, n = out.shape
    precise = x.dtype == torch.float32
    batch = 16 if rows <= 16 * count else 64
    columns, depth = (32, 32) if precise else (64, 64)
    start(
        _gemm_4bit_grouped_portable_kernel,
        (tile_bound(rows, count, batch), -(-n // columns)),
        packed, x, order, ends, absmax, *nested, levels, bias, out,
        rows, count, n, x.shape[1], x.stride(0), repeat,
        triton.next_power_of_2(max(32, count + 1)), batch, columns, depth, blocksize, transposed,
        nested[0] is not None, bias is not None, precise,
        num_warps=4,
    )  # fmt: skip
