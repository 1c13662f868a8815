"""The plan of a fused 4-bit product: tile, grid, numbers and compiled kernel, made once and run in every call."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from halfbyte.backends.triton.dequantize import Nested
from halfbyte.backends.triton.launch import Launcher, allocation, on_its_device, raw_stream
from halfbyte.backends.triton.partial_sum import PartialSum
from halfbyte.backends.triton.tuning import Tile

__all__ = ["FusedPlan", "fused_kernels"]


@functools.lru_cache(maxsize=1)
def fused_kernels() -> dict[str, Any]:
    """The Gluon kernels by the kind of their tiles; none, with a warning, where this Triton's Gluon is another one."""
    try:
        from halfbyte.backends.triton.kernels.gemm_small_batch import _gemm_4bit_small_batch_kernel
        from halfbyte.backends.triton.kernels.gemm_staged import _gemm_4bit_staged_kernel
        from halfbyte.backends.triton.kernels.gemm_warpgroup import _gemm_4bit_warpgroup_kernel
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"Triton {triton.__version__} has no Gluon that halfbyte knows ({error}); small 4-bit products are slower",
            stacklevel=2,
        )
        return {}
    return {
        "register": _gemm_4bit_small_batch_kernel,
        "staged": _gemm_4bit_staged_kernel,
        "warpgroup": _gemm_4bit_warpgroup_kernel,
    }


def _constants(
    tile: Tile, pair: int, chain: int, per_block: int, even: bool, aligned: bool, nested: bool, bias: bool,
    turns: bool,
) -> tuple[int, ...]:  # fmt: skip
    """What the kernels of a grid of tiles are compiled for, in their order."""
    stages = tile.stages
    if tile.kind == "warpgroup":
        warps = tile.k_warps * tile.n_warps
        constants = (tile.rows, tile.batch, tile.unroll, chain, per_block, warps, tile.split, even, nested, bias)
    else:
        constants = (
            tile.rows, tile.batch, pair, tile.unroll, chain, per_block, tile.k_warps, tile.n_warps, tile.split, even,
            aligned, nested, bias,
        )  # fmt: skip
    if tile.kind == "register":
        # Two iterations take turns only if their number is even.
        return (*constants, stages if turns or stages < 3 else 1)
    if tile.table:
        # Static and dynamic shared memory together may pass 48 KiB only if the dynamic part alone does.
        while 16384 - 1024 < replace(tile, stages=stages).shared_bytes(pair) <= 49152:
            stages += 1
    return (*constants, tile.table, stages)


class FusedPlan:
    """All that a fused product needs and that does not change from call to call: tile, grid, numbers, kernel."""

    __slots__ = ("_grid", "_launcher", "_numbers", "_pairs", "_sum")

    def __init__(
        self,
        m: int,
        n: int,
        k: int,
        blocksize: int,
        pairs: Tensor,
        words: tuple[int, ...],
        tile: Tile,
        x_stride: int,
        *,
        nested: bool,
        bias: bool,
    ) -> None:
        aligned = k % blocksize == 0
        pair = 2 if k % 64 == 0 and blocksize >= 64 else 1
        groups = k // (32 * pair)
        per_block = blocksize // (32 * pair)
        unroll = tile.unroll
        chain = min(per_block, unroll) if aligned else 1
        slices_of_k = tile.split * tile.k_warps
        per_slice = -(-groups // (slices_of_k * unroll)) * unroll
        row_blocks = k // blocksize if aligned else groups
        even = groups == per_slice * slices_of_k
        self._pairs = pairs
        warps = tile.k_warps * tile.n_warps
        first = () if tile.kind == "register" else words
        self._numbers = (*first, m, n, k // 8, row_blocks, x_stride, groups, per_slice)
        self._grid = (-(-n // tile.rows), tile.split, -(-m // tile.batch))
        turns = per_slice // unroll % 2 == 0
        constants = _constants(tile, pair, chain, per_block, even, aligned, nested, bias and tile.split == 1, turns)
        kernel = fused_kernels()[tile.kind]
        self._launcher = Launcher(kernel, constants, num_warps=warps, enable_fp_fusion=True)
        self._sum = PartialSum((tile.split, m, n), bias=bias) if tile.split > 1 else None

    def run(
        self, x: Tensor, packed: Tensor, absmax: Tensor, nested: Nested, bias: Tensor | None, out: Tensor, index: int
    ) -> None:
        """``out = x @ weight.T + bias`` on the current stream of device ``index``, which is current."""
        partial = out
        if self._sum is not None:
            partial = torch.empty(self._sum.shape, dtype=torch.float32, device=out.device)
        if self._launcher.compiled():
            a, b, c = nested
            self._launcher.direct(
                self._grid,
                raw_stream(index),
                packed.data_ptr(),
                x.data_ptr(),
                absmax.data_ptr(),
                None if a is None else a.data_ptr(),
                None if b is None else b.data_ptr(),
                None if c is None else c.data_ptr(),
                None if bias is None else bias.data_ptr(),
                partial.data_ptr(),
                self._pairs.data_ptr(),
                *self._numbers,
            )
        else:
            self._launcher.ordinary(self._grid, packed, x, absmax, *nested, bias, partial, self._pairs, *self._numbers)
        if self._sum is not None:
            self._sum.run(partial, bias, out, index)

    def repeated(
        self, packed: Tensor, absmax: Tensor, nested: Nested, bias: Tensor | None, shape: tuple[int, ...], index: int
    ) -> Callable[[Tensor], Tensor | None] | None:
        """``run`` with these tensors as they lie, for other activations; None where nothing ran yet."""
        first = ((packed,), (absmax, *nested, bias), (self._pairs,), self._numbers)
        total = self._sum
        if total is None:
            whole = self._launcher.repeated(self._grid, index, shape, *first)
            return None if whole is None else on_its_device(whole, index)
        parts = self._launcher.repeated(self._grid, index, total.shape, *first, torch.float32)
        summed = total.bound(index)
        if parts is None or summed is None:
            return None
        address = None if bias is None else bias.data_ptr()
        empty = allocation(shape)

        def call(x: Tensor) -> Tensor | None:
            partial = parts(x)
            if partial is None:
                return None
            out = empty(x)
            summed(partial.data_ptr(), address, out.data_ptr())
            return out

        return on_its_device(call, index)
