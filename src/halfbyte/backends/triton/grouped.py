"""Launchers of the products with many experts: rows sorted by expert, one launch for all experts."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from halfbyte.backends.registry import implements
from halfbyte.backends.triton import grouped_slices
from halfbyte.backends.triton.dequantize import Nested, as_bytes, readable
from halfbyte.backends.triton.device import gpu_of, levels_of, rounded_pairs_of
from halfbyte.backends.triton.grouped_tiles import SLICED_FROM, GroupedTile, tile_for
from halfbyte.backends.triton.kernels.grouped import _gemm_4bit_grouped_portable_kernel, _group_rows_kernel
from halfbyte.backends.triton.launch import Launcher, aligned, check_devices, dense, on_device, raw_stream, start

__all__ = ["GroupedPlan", "gemm_4bit_grouped", "group_rows", "tile_bound"]

COUNTED_ROWS = 4096
"""Rows up to which one launch sorts them by counting; beyond, torch sorts."""

PLACED, COMPARED = 32, 128
"""Rows that a program of that launch places, and with how many others it compares them at a time."""

_sorters: dict[tuple[Any, ...], Launcher] = {}


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
    numbers = (rows, count, -(-rows // PLACED))
    grid = (numbers[2] + -(-count // PLACED), 1, 1)
    index = flat.device.index
    key = (flat.dtype, index, aligned(flat))
    launcher = _sorters.get(key)
    if launcher is None:
        launcher = _sorters[key] = Launcher(_group_rows_kernel, (PLACED, COMPARED), num_warps=4)
    with on_device(index):
        if launcher.compiled():
            launcher.direct(grid, raw_stream(index), flat.data_ptr(), order.data_ptr(), ends.data_ptr(), *numbers)
        else:
            launcher.ordinary(grid, flat, order, ends, *numbers)
    return order, ends


class GroupedPlan:
    """All that the Gluon kernel needs and that does not change from call to call."""

    __slots__ = ("_grid", "_launcher", "_numbers", "_pairs")

    def __init__(
        self,
        tile: GroupedTile,
        rows: int,
        count: int,
        n: int,
        k: int,
        *,
        x_stride: int,
        repeat: int,
        blocksize: int,
        pairs: Tensor,
        nested: bool,
        bias: bool,
    ) -> None:
        groups, per_block, unroll = k // 64, blocksize // 64, tile.unroll
        per_slice = -(-groups // (tile.k_warps * unroll)) * unroll
        self._pairs = pairs
        self._numbers = (rows, count, repeat, n, k // 8, k // blocksize, x_stride, groups, per_slice)
        self._grid = (tile_bound(rows, count, tile.batch), -(-n // tile.rows), 1)
        constants = (
            _padded(count), tile.rows, tile.batch, 2, unroll, min(per_block, unroll), per_block, tile.k_warps,
            tile.n_warps, groups == per_slice * tile.k_warps, nested, bias, tile.ahead, tile.halves,
        )  # fmt: skip
        self._launcher = Launcher(fused_kernel(), constants, num_warps=tile.k_warps * tile.n_warps)

    def run(
        self,
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        nested: Nested,
        order: Tensor,
        ends: Tensor,
        bias: Tensor | None,
        out: Tensor,
    ) -> None:
        """Fill ``out`` on the current stream; every tensor begins at a multiple of 16 bytes."""
        tensors = (packed, x, order, ends, absmax, *nested, bias, out, self._pairs)
        if self._launcher.compiled():
            addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            self._launcher.direct(self._grid, raw_stream(x.device.index), *addresses, *self._numbers)
        else:
            self._launcher.ordinary(self._grid, *tensors, *self._numbers)


MOST_PLANS = 4096
_plans: dict[tuple[Any, ...], GroupedPlan] = {}


def _padded(count: int) -> int:
    """Experts, and one more for rows without, as a power of two."""
    return triton.next_power_of_2(max(32, count + 1))


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
    """Every row times its expert's weight: decoded inside the product for few rows, slice by slice for many."""
    count = shapeB[0]
    n, k = (shapeB[2], shapeB[1]) if transposed else (shapeB[1], shapeB[2])
    rows = order.numel()
    out = torch.empty((rows, n), dtype=A.dtype, device=A.device)
    if not out.numel():
        return out
    nested = readable((absmax_8bit, absmax_code, absmax_offset))
    order, ends, absmax, bias = dense(order), dense(ends), dense(absmax), dense(bias)
    check_devices("experts", "module", B, order, ends, absmax, *nested, bias)
    x = A
    if A.stride(1) != 1 or A.stride(0) % 8 or not aligned(A):
        x = A.clone(memory_format=torch.contiguous_format)
    repeat, packed, index = rows // A.shape[0], as_bytes(B), A.device.index
    gpu = gpu_of(index)
    fused = not transposed and gpu.gluon and _fits(A.dtype, shapeB, blocksize) and fused_kernel() is not None
    with on_device(index):
        if rows > SLICED_FROM[fused] * count and grouped_slices.why_not(x, n, k) is None:
            grouped_slices.product(
                x, packed, absmax, nested, order, ends, bias, out,
                repeat=repeat, blocksize=blocksize, quant_type=quant_type, transposed=transposed,
            )  # fmt: skip
        elif fused and aligned(packed, order, ends, absmax, *nested, bias):
            key = (
                rows, count, n, k, x.stride(0), repeat, blocksize, quant_type, A.dtype, index, absmax_8bit is None,
                bias is None,
            )  # fmt: skip
            plan = _plans.get(key)
            if plan is None:
                if len(_plans) >= MOST_PLANS:  # every number of rows has one
                    _plans.clear()
                plan = _plans[key] = GroupedPlan(
                    tile_for(gpu, rows, count, k), rows, count, n, k,
                    x_stride=x.stride(0), repeat=repeat, blocksize=blocksize,
                    pairs=rounded_pairs_of(quant_type, A.dtype, index),
                    nested=absmax_8bit is not None, bias=bias is not None,
                )  # fmt: skip
            plan.run(x, packed, absmax, nested, order, ends, bias, out)
        else:
            levels = levels_of(quant_type, index)
            _portable(x, packed, absmax, nested, order, ends, bias, out, levels, repeat, blocksize, transposed)
    return out


def _fits(dtype: torch.dtype, shape: Sequence[int], blocksize: int) -> bool:
    """Whether the Gluon kernel takes such experts: rows of whole blocks, numbers below 2^31 within an expert."""
    count, n, k = shape
    if dtype == torch.float32 or blocksize < 64 or k % 64 or k % blocksize:
        return False
    return n * k // 8 < 1 << 31 and count * n * k // blocksize < 1 << 31


def _portable(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: Nested,
    order: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    out: Tensor,
    levels: Tensor,
    repeat: int,
    blocksize: int,
    transposed: bool,
) -> None:
    (rows, n), count = out.shape, ends.numel()
    precise = x.dtype == torch.float32
    batch = 16 if rows <= 16 * count else 64
    columns, depth = (32, 32) if precise else (64, 64)
    start(
        _gemm_4bit_grouped_portable_kernel,
        (tile_bound(rows, count, batch), -(-n // columns)),
        packed, x, order, ends, absmax, *nested, levels, bias, out,
        rows, count, n, x.shape[1], x.stride(0), repeat,
        _padded(count), batch, columns, depth, blocksize, transposed, nested[0] is not None, bias is not None,
        precise,
        num_warps=4,
    )  # fmt: skip
