"""Plans of int8 products: kernels, grids and numbers that do not change from call to call, and the memory between."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from halfbyte.backends.triton.device import gpu_of
from halfbyte.backends.triton.int8_tuning import Tile, tile_for
from halfbyte.backends.triton.kernels.int8 import _int8_gather_kernel, _int8_rows_kernel
from halfbyte.backends.triton.kernels.int8_product import _int8_product_kernel
from halfbyte.backends.triton.kernels.int8_row import _int8_row_kernel
from halfbyte.backends.triton.launch import ALIGNMENT, Launcher, raw_stream, start
from halfbyte.formats import int8

__all__ = ["Plan", "RowPlan", "make_plan", "product", "quantize"]

OWN_WORDS = 16
"""Rows up to which every row writes its own bits of outlier columns: no memory has to be zeroed before."""

GATHERED_FROM = 256
"""Rows from which outlier columns are copied side by side, for tiles to share."""

CAPACITY = 64
"""Outlier columns copied; the product looks up the others itself."""

OUTLIERS = 16
"""Outlier columns multiplied in one step."""

WORDS_AT_ONCE = 512
GATHER_ROWS = 64
LARGEST_WITH_FLOATS = 64 * 128
"""Largest tile whose fp32 outliers, or unquantized weight, fit into registers beside its sums."""


class _Step:
    """One kernel of a plan: tensors or addresses are given anew in each call, all else is fixed."""

    __slots__ = ("_constants", "_grid", "_kernel", "_launcher", "_numbers", "_options")

    def __init__(
        self, kernel: Any, grid: int, numbers: tuple[Any, ...], constants: tuple[Any, ...], **options: Any
    ) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, (grid, 1, 1), numbers, constants
        self._options = options
        self._launcher = Launcher(kernel, constants, **options)

    def ready(self) -> bool:
        return self._launcher.compiled()

    def direct(self, index: int, *addresses: Any) -> None:
        """Launch with addresses for tensors, which are aligned."""
        self._launcher.direct(self._grid, raw_stream(index), *addresses, *self._numbers)

    def ordinary(self, aligned: bool, *tensors: Any) -> None:
        """Launch with tensors; compiles at the first call."""
        if aligned:
            self._launcher.ordinary(self._grid, *tensors, *self._numbers)
        else:
            start(self._kernel, self._grid, *tensors, *self._numbers, *self._constants, **self._options)


def _rows_step(rows: int, k: int, x_stride: int, split: bool, shared: bool) -> _Step:
    block = max(128, min(4096, triton.next_power_of_2(k)))
    options = {"num_warps": 8 if block >= 2048 else 4, "enable_fp_fusion": False}
    return _Step(_int8_rows_kernel, rows, (k, x_stride), (split, shared, block), **options)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _aligned(*places: int | None) -> bool:
    together = 0
    for place in places:
        together |= place or 0
    return together % ALIGNMENT == 0


class _Memory:
    """Tensors between the kernels of one call, in one allocation; None for those that are not there."""

    __slots__ = ("_parts", "_size")

    def __init__(self, *parts: tuple[tuple[int, ...], torch.dtype] | None) -> None:
        self._parts: list[tuple[int, int, tuple[int, ...], torch.dtype] | None] = []
        self._size = 0
        for part in parts:
            if part is None:
                self._parts.append(None)
                continue
            shape, dtype = part
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            self._parts.append((self._size, nbytes, shape, dtype))
            self._size += -(-nbytes // 256) * 256

    def allocate(self, device: torch.device, zeroed: bool) -> Tensor:
        """Memory of all parts; ``zeroed``: the first one is."""
        memory = torch.empty(self._size, dtype=torch.uint8, device=device)
        if zeroed and self._parts[0] is not None:
            memory[: self._parts[0][1]].zero_()
        return memory

    def addresses(self, memory: Tensor) -> list[int | None]:
        base = memory.data_ptr()
        return [None if part is None else base + part[0] for part in self._parts]

    def tensors(self, memory: Tensor) -> list[Tensor | None]:
        return [
            None if part is None else memory[part[0] : part[0] + part[1]].view(part[3]).view(part[2])
            for part in self._parts
        ]


class RowPlan:
    """``int8_linear`` of one row: a single kernel. Arguments as :class:`Plan`'s."""

    __slots__ = ("_index", "_step")

    def __init__(self, n: int, k: int, dtype: torch.dtype, tile: Tile, index: int, *, split: bool, bias: bool) -> None:
        self._index = index
        words = triton.next_power_of_2(k // 4)
        programs = min(-(-n // tile.n), gpu_of(index).multiprocessors * tile.stages)
        planes = 4 if dtype == torch.float32 else 3
        constants = (
            int8.STEP, int8.STEP_SQUARED, tile.n, words, planes, torch.version.hip is None, words * 4 == k, split, bias,
            programs,
        )  # fmt: skip
        options = {"num_warps": tile.warps, "enable_fp_fusion": False}
        self._step = _Step(_int8_row_kernel, programs, (n, k // 4), constants, **options)

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
        places = x.data_ptr(), CB.data_ptr(), out.data_ptr(), _address(bias), SCB.data_ptr()
        aligned = _aligned(*places)
        if aligned and self._step.ready():
            self._step.direct(self._index, *places, threshold)
        else:
            words = CB.clone() if CB.data_ptr() % 4 else CB
            self._step.ordinary(aligned, x, words.view(torch.int32), out, bias, SCB, threshold)


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

    __slots__ = ("_gather", "_index", "_memory", "_product", "_rows", "_split", "_zeroed")

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
        self._zeroed = split and rows > OWN_WORDS
        gathered = split and not full and rows >= GATHERED_FROM
        self._rows = _rows_step(rows, k, x_stride, split, self._zeroed)
        words = -(-k // 32)
        whole = triton.next_power_of_2(words)
        self._memory = _Memory(
            ((1 if self._zeroed else rows, words), torch.int32) if split else None,
            ((rows, k), torch.int8),
            ((rows,), torch.float32),
            ((rows, CAPACITY), dtype) if gathered else None,
            ((n, CAPACITY), dtype) if gathered else None,
            ((1,), torch.int32) if gathered else None,
        )
        numbers = (rows, n, k, x_stride)
        self._gather: _Step | None = None
        if gathered:
            blocks = -(-rows // GATHER_ROWS) + -(-n // GATHER_ROWS)
            shape = (CAPACITY, whole, GATHER_ROWS, OUTLIERS)
            self._gather = _Step(_int8_gather_kernel, blocks, numbers, shape, num_warps=4)
        tiles = -(-rows // tile.m) * -(-n // tile.n)
        head = (int8.STEP, int8.STEP_SQUARED, tile.m, tile.n, tile.k, OUTLIERS, tile.group)
        at_once = whole if gathered else min(WORDS_AT_ONCE, whole)
        tail = (CAPACITY if gathered else 0, at_once, 1 if self._zeroed else OWN_WORDS, False, split, full, bias)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        constants = (*head, k % tile.k == 0, *tail)
        self._product = _Step(_int8_product_kernel, tiles, numbers, constants, **options)

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
        memory = self._memory.allocate(x.device, self._zeroed)
        given: tuple[Any, ...] = x, CB, SCB, bias, full, out
        places = tuple(map(_address, given))
        aligned = _aligned(*places)
        between: list[Any]
        direct = aligned and self._product.ready()
        if direct:
            given, between = places, self._memory.addresses(memory)
        else:
            between = self._memory.tensors(memory)
        for step, arguments in self._steps(given, between):
            if direct:
                step.direct(self._index, *arguments, threshold)
            else:
                step.ordinary(aligned, *arguments, threshold)

    def _steps(self, given: tuple[Any, ...], between: list[Any]) -> list[tuple[_Step, tuple[Any, ...]]]:
        """The kernels in their order, each with its tensors or addresses."""
        x, CB, SCB, bias, full, out = given
        words, codes, absmax, apart_x, apart_weight, count = between
        source = x if self._split else None
        steps: list[tuple[_Step, tuple[Any, ...]]] = [(self._rows, (x, codes, absmax, words))]
        if self._gather is not None:
            steps.append((self._gather, (words, x, CB, apart_x, apart_weight, count)))
        last = (codes, CB, out, bias, absmax, SCB, source, full, words, apart_x, apart_weight, count)
        return [*steps, (self._product, last)]


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
    _rows_step(rows, columns, x.stride(0), False, False).ordinary(False, x, codes, absmax, None, 0.0)
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
        *(0.0, rows, n, k, k, int8.STEP, int8.STEP_SQUARED, tile.m, tile.n, tile.k, OUTLIERS, tile.group),
        *(k % tile.k == 0, 0, 1, 1, raw, False, False, bias is not None),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
