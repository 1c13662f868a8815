"""Plans of int8 products: kernels, grids and numbers that do not change from call to call, and the memory between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from halfbyte.backends.triton.device import gpu_of
from halfbyte.backends.triton.int8_step import Memory, Step, address, aligned_addresses, rows_step
from halfbyte.backends.triton.int8_tuning import Tile, tile_for
from halfbyte.backends.triton.kernels.int8 import _clear_kernel, _int8_gather_kernel
from halfbyte.backends.triton.kernels.int8_product import _int8_product_kernel
from halfbyte.backends.triton.kernels.int8_row import _int8_row_kernel
from halfbyte.backends.triton.launch import ALIGNMENT, allocation, on_its_device, start
from halfbyte.formats import int8

__all__ = ["Plan", "RowPlan", "make_plan", "product", "quantize"]

GATHERED_FROM = 256
GATHERED_WORK = 1 << 34
"""Rows, and multiplications, from which outlier columns are copied side by side, for tiles to share.

An H100 is as fast without while there are fewer (within 5 % at all of 256 and 512 rows of three shapes, and faster at
4096 x 4096), and the host has two kernels less to start.
"""

CAPACITY = 64
"""Outlier columns copied; the product looks up the others itself."""

OUTLIERS = 16
"""Outlier columns multiplied in one step."""

WORDS_AT_ONCE = 512
GATHER_ROWS = 64
CLEARED_AT_ONCE = 1024
LARGEST_WITH_FLOATS = 64 * 128
"""Largest tile whose fp32 outliers, or unquantized weight, fit into registers beside its sums."""

Repeated = Callable[[Tensor], "Tensor | None"]
"""A product with activations of one shape; None, with nothing launched, for one that is aligned too little."""


class RowPlan:
    """``int8_linear`` of one row: a single kernel. Arguments as :class:`Plan`'s."""

    __slots__ = ("_index", "_step")

    def __init__(self, n: int, k: int, dtype: torch.dtype, tile: Tile, index: int, *, split: bool, bias: bool) -> None:
        self._index = index
        words = triton.next_power_of_2(k // 4)
        programs = min(-(-n // tile.n), gpu_of(index).multiprocessors * tile.stages)
        planes = 4 if dtype == torch.float32 else 3
        constants = (
            int8.STEP, tile.n, words, planes, torch.version.hip is None, words * 4 == k, split, bias, programs,
        )  # fmt: skip
        options = {"num_warps": tile.warps, "enable_fp_fusion": False}
        self._step = Step(_int8_row_kernel, programs, (n, k // 4), constants, **options)

    def run(
        self,
        x: Tensor,
        CB: Tensor,
        SCB: Tensor,
        threshold: float,
        bias: Tensor | None,
        full: Tensor | None,
        out: Tensor,
    ) -> None:
        """Fill ``out`` on the current stream of the plan's device, which is current."""
        places = x.data_ptr(), CB.data_ptr(), address(bias), SCB.data_ptr(), out.data_ptr()
        aligned = aligned_addresses(*places)
        if aligned and self._step.ready():
            self._step.direct(self._index, *places, threshold)
        else:
            words = CB.clone() if CB.data_ptr() % 4 else CB
            self._step.ordinary(aligned, x, words.view(torch.int32), bias, SCB, out, threshold)

    def repeated(
        self, CB: Tensor, SCB: Tensor, threshold: float, bias: Tensor | None, shape: tuple[int, ...]
    ) -> Repeated | None:
        """``run`` with these tensors as they lie, for other contiguous activations; None where nothing ran yet."""
        whole = self._step.repeated(self._index, shape, (CB, bias, SCB), threshold)
        return None if whole is None else on_its_device(whole, self._index)


class Plan:
    """``int8_linear`` for one shape, dtype and set of options on one GPU.

    Args:
        rows: Of the activation (M).
        n: Rows of the weight.
        k: Codes of a row.
        x_stride: Elements from one row of the activation to the next.
        dtype: Of activation and output.
        tile: The product's.
        index: Of the GPU.
        split: Whether there is a threshold.
        full: Whether outliers meet an unquantized weight.
        bias: Whether there is one.
    """

    __slots__ = ("_clear", "_gather", "_index", "_memory", "_product", "_rows", "_split")

    def __init__(
        self,
        rows: int,
        n: int,
        k: int,
        x_stride: int,
        dtype: torch.dtype,
        tile: Tile,
        index: int,
        *,
        split: bool,
        full: bool,
        bias: bool,
    ) -> None:
        self._index, self._split = index, split
        if split and (full or dtype == torch.float32) and tile.m * tile.n > LARGEST_WITH_FLOATS:
            tile = Tile("pointer", 64, 64, 128, 8, 4, 3)
        gathered = split and not full and rows >= GATHERED_FROM and rows * n * k >= GATHERED_WORK
        self._rows = rows_step(rows, k, x_stride, split, gathered)
        words = -(-k // 32)
        whole = triton.next_power_of_2(words)
        self._memory = Memory(
            ((1 if gathered else rows, words), torch.int32) if split else None,
            ((rows, k), torch.int8),
            ((rows,), torch.float32),
            ((rows, CAPACITY), dtype) if gathered else None,
            ((n, CAPACITY), dtype) if gathered else None,
            ((1,), torch.int32) if gathered else None,
        )
        numbers = (rows, n, k, x_stride)
        self._clear: Step | None = None
        self._gather: Step | None = None
        if gathered:
            self._clear = Step(_clear_kernel, -(-words // CLEARED_AT_ONCE), (words,), (CLEARED_AT_ONCE,), num_warps=4)
            blocks = -(-rows // GATHER_ROWS) + -(-n // GATHER_ROWS)
            self._gather = Step(
                _int8_gather_kernel, blocks, numbers, (CAPACITY, whole, GATHER_ROWS, OUTLIERS), num_warps=4
            )
        tiles = -(-rows // tile.m) * -(-n // tile.n)
        head = (int8.STEP, tile.m, tile.n, tile.k, OUTLIERS, tile.group)
        at_once = whole if gathered else min(WORDS_AT_ONCE, whole)
        tail = (CAPACITY if gathered else 0, at_once, False, split, full, bias)
        # No fusion: a row's result has the same bits in every plan.
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
        self._product = Step(_int8_product_kernel, tiles, numbers, (*head, k % tile.k == 0, *tail), **options)

    def run(
        self,
        x: Tensor,
        CB: Tensor,
        SCB: Tensor,
        threshold: float,
        bias: Tensor | None,
        full: Tensor | None,
        out: Tensor,
    ) -> None:
        """Fill contiguous ``out`` on the current stream of the plan's device, which is current."""
        memory = torch.empty(self._memory.size, dtype=torch.uint8, device=x.device)
        given: tuple[Any, ...] = x, CB, SCB, bias, full, out
        places = tuple(map(address, given))
        aligned = aligned_addresses(*places)
        between: list[Any]
        direct = aligned and self._product.ready()
        if direct:
            given, between = places, self._memory.addresses(memory)
        else:
            between = self._memory.tensors(memory)
        for step, arguments in self._steps(given, between, threshold):
            if direct:
                step.direct(self._index, *arguments)
            else:
                step.ordinary(aligned, *arguments)

    def _steps(
        self, given: tuple[Any, ...], between: list[Any], threshold: float
    ) -> list[tuple[Step, tuple[Any, ...]]]:
        """The kernels in their order, each with its tensors or addresses."""
        x, CB, SCB, bias, full, out = given
        words, codes, absmax, apart_x, apart_weight, count = between
        source = x if self._split else None
        steps: list[tuple[Step, tuple[Any, ...]]] = []
        if self._clear is not None:
            steps.append((self._clear, (words,)))
        steps.append((self._rows, (x, codes, absmax, words, threshold)))
        if self._gather is not None:
            steps.append((self._gather, (words, x, CB, apart_x, apart_weight, count, threshold)))
        last = (codes, CB, out, bias, absmax, SCB, source, full, words, apart_x, apart_weight, count, threshold)
        return [*steps, (self._product, last)]

    def repeated(
        self, CB: Tensor, SCB: Tensor, threshold: float, bias: Tensor | None, shape: tuple[int, ...]
    ) -> Repeated | None:
        """``run`` with these tensors as they lie, for other contiguous activations; None where nothing ran yet.

        Written out: what a loop over the steps costs the host is more than what it saves here.
        """
        if not self._product.ready():
            return None
        nothing: tuple[Any, int, tuple[Any, ...], tuple[Any, ...]] = (None, 0, (), ())
        run_clear, clear_grid, clear_head, clear_tail = nothing if self._clear is None else self._clear.opened()
        run_rows, rows_grid, rows_head, rows_tail = self._rows.opened()
        run_gather, gather_grid, gather_head, gather_tail = nothing if self._gather is None else self._gather.opened()
        run_product, grid, head, tail = self._product.opened()
        index, stream, split = self._index, torch._C._cuda_getCurrentRawStream, self._split  # pyright: ignore[reportPrivateUsage]
        _, to_codes, to_absmax, to_x, to_weight, to_count = (offset or 0 for offset in self._memory.offsets)
        weight, scales, added = CB.data_ptr(), SCB.data_ptr(), address(bias)
        empty, workspace = allocation(shape), allocation((self._memory.size,), torch.uint8)

        def call(x: Tensor) -> Tensor | None:
            source = x.data_ptr()
            if source % ALIGNMENT:
                return None
            memory, out = workspace(x), empty(x)
            base, current = memory.data_ptr(), stream(index)
            codes, absmax = base + to_codes, base + to_absmax
            bits = apart_x = apart_weight = count = None
            if split:
                bits = base
            if run_clear is not None:
                run_clear(clear_grid, 1, 1, current, *clear_head, bits, *clear_tail)
            run_rows(rows_grid, 1, 1, current, *rows_head, source, codes, absmax, bits, threshold, *rows_tail)
            if run_gather is not None:
                apart_x, apart_weight, count = base + to_x, base + to_weight, base + to_count
                run_gather(
                    gather_grid, 1, 1, current, *gather_head,
                    bits, source, weight, apart_x, apart_weight, count, threshold, *gather_tail,
                )  # fmt: skip
            run_product(
                grid, 1, 1, current, *head, codes, weight, out.data_ptr(), added, absmax, scales,
                source if split else None, None, bits, apart_x, apart_weight, count, threshold, *tail,
            )  # fmt: skip
            return out

        return on_its_device(call, index)


def make_plan(
    rows: int,
    n: int,
    k: int,
    x_stride: int,
    dtype: torch.dtype,
    index: int,
    *,
    split: bool,
    full: bool,
    bias: bool,
) -> Plan | RowPlan:
    """The plan with the measured tile, or that of the rule. Arguments as :class:`Plan`'s."""
    tile = tile_for(gpu_of(index), rows, n, k)
    if tile.kind == "row" and not full:
        return RowPlan(n, k, dtype, tile, index, split=split, bias=bias)
    if tile.kind == "row":
        tile = Tile("pointer", 16, 64, 128, 1, 4, 4)
    return Plan(rows, n, k, x_stride, dtype, tile, index, split=split, full=full, bias=bias)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and fp32 absmax of every row of ``x``, on the current device."""
    rows, columns = x.shape
    codes = torch.empty((rows, columns), dtype=torch.int8, device=x.device)
    absmax = torch.empty(rows, dtype=torch.float32, device=x.device)
    rows_step(rows, columns, x.stride(0), False, False).ordinary(False, x, codes, absmax, None, 0.0)
    return codes, absmax


def product(
    codes: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None,
    row_absmax: Tensor | None,
    column_absmax: Tensor | None,
) -> None:
    """Fill contiguous ``out``, ``(M, N)``: sums where it is int32, else scaled."""
    (rows, k), n = codes.shape, weight.shape[0]
    tile = tile_for(gpu_of(codes.device.index), max(rows, 16), n, k)
    raw = out.dtype == torch.int32
    start(
        _int8_product_kernel,
        (triton.cdiv(rows, tile.m) * triton.cdiv(n, tile.n),),
        *(codes, weight, out, bias, row_absmax, column_absmax, None, None, None, None, None, None),
        *(0.0, rows, n, k, k, int8.STEP, tile.m, tile.n, tile.k, OUTLIERS, tile.group),
        *(k % tile.k == 0, 0, 1, raw, False, False, bias is not None),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
