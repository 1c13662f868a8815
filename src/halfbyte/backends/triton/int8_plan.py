"""Plans of int8 products: kernels, grids and numbers that do not change from call to call, and the memory between."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from halfbyte.backends.triton.device import gpu_of
from halfbyte.backends.triton.int8_tuning import Tile, tile_for
from halfbyte.backends.triton.kernels.int8 import _int8_gather_kernel, _int8_rows_kernel
from halfbyte.backends.triton.kernels.int8_gemv import _int8_gemv_kernel
from halfbyte.backends.triton.kernels.int8_product import _int8_product_kernel, _int8_product_tma_kernel
from halfbyte.backends.triton.kernels.int8_row import _int8_row_kernel
from halfbyte.backends.triton.launch import Launcher, raw_stream, start
from halfbyte.formats import int8

__all__ = ["Plan", "product", "quantize"]

ALIGNMENT = 16
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


class _Step:
    """One kernel of a plan: tensors and addresses are given anew in each call, all else is fixed."""

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
    constants = (split, shared, block)
    return _Step(
        _int8_rows_kernel,
        rows,
        (k, x_stride),
        constants,
        num_warps=8 if block >= 2048 else 4,
        enable_fp_fusion=False,
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Memory:
    """Tensors between the kernels of one call, in one allocation."""

    __slots__ = ("_parts", "_size")

    def __init__(self, **parts: tuple[tuple[int, ...], torch.dtype] | None) -> None:
        self._parts: list[tuple[int, int, tuple[int, ...], torch.dtype] | None] = []
        self._size = 0
        for part in parts.values():
            if part is None:
                self._parts.append(None)
                continue
            shape, dtype = part
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            self._parts.append((self._size, nbytes, shape, dtype))
            self._size += -(-nbytes // 256) * 256

    def allocate(self, device: torch.device) -> Tensor:
        return torch.empty(self._size, dtype=torch.uint8, device=device)

    def addresses(self, memory: Tensor) -> list[int | None]:
        base = memory.data_ptr()
        return [None if part is None else base + part[0] for part in self._parts]

    def tensors(self, memory: Tensor) -> list[Tensor | None]:
        return [
            None if part is None else memory[part[0] : part[0] + part[1]].view(part[3]).view(part[2])
            for part in self._parts
        ]

    def range_of(self, number: int) -> tuple[int, int]:
        part = self._parts[number]
        return (0, 0) if part is None else (part[0], part[0] + part[1])


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
        self._index = index
        self._quad = tile.kind == "rows"
        self._one = tile.kind == "row" and not full
        if tile.kind == "row" and full:
            tile = Tile("pointer", 16, 64, 128, 1, 4, 4)
        self._tma: tuple[list[int], list[int]] | None = None
        if self._one:
            words = triton.next_power_of_2(k // 4)
            blocks = -(-n // tile.n)
            programs = min(blocks, gpu_of(index).multiprocessors * tile.stages)
            planes = 4 if dtype == torch.float32 else 3
            self._product = _Step(
                _int8_row_kernel,
                programs,
                (n, k // 4),
                (
                    int8.STEP, int8.STEP_SQUARED, tile.n, words, planes, torch.version.hip is None, words * 4 == k,
                    split, bias, programs,
                ),
                num_warps=tile.warps,
                enable_fp_fusion=False,
            )  # fmt: skip
            return
        if self._quad:
            block = min(4096 // tile.m, max(128, triton.next_power_of_2(k)))
            depth = min(tile.k, max(128, triton.next_power_of_2(k)))
            self._product = _Step(
                _int8_gemv_kernel,
                -(-n // tile.n),
                (rows, n, k, k // 4, x_stride),
                (
                    int8.STEP, int8.STEP_SQUARED, tile.m, tile.n, depth, block, OUTLIERS, torch.version.hip is None,
                    k % depth == 0, split, full, bias,
                ),
                num_warps=tile.warps,
                enable_fp_fusion=False,
            )  # fmt: skip
            return
        if split and (full or dtype == torch.float32) and tile.m * tile.n > 64 * 128:
            tile = Tile("pointer", 64, 64, 128, 8, 4, 3)
        self._shared = split and rows > OWN_WORDS
        gathered = split and not full and rows >= GATHERED_FROM
        self._rows = _rows_step(rows, k, x_stride, split, self._shared)
        whole = triton.next_power_of_2(-(-k // 32))
        words = (1 if self._shared else rows, -(-k // 32))
        self._memory = _Memory(
            words=(words, torch.int32) if split else None,
            codes=((rows, k), torch.int8),
            absmax=((rows,), torch.float32),
            apart_x=((rows, CAPACITY), dtype) if gathered else None,
            apart_weight=((n, CAPACITY), dtype) if gathered else None,
            count=((1,), torch.int32) if gathered else None,
        )
        self._gather: _Step | None = None
        if gathered:
            blocks = -(-rows // GATHER_ROWS) + -(-n // GATHER_ROWS)
            shape = (CAPACITY, whole, GATHER_ROWS, OUTLIERS)
            self._gather = _Step(_int8_gather_kernel, blocks, (rows, n, k, x_stride), shape, num_warps=4)
        tiles = -(-rows // tile.m) * -(-n // tile.n)
        at_once = whole if gathered else min(WORDS_AT_ONCE, whole)
        word_rows = 1 if self._shared else OWN_WORDS
        numbers = (rows, n, k, x_stride)
        head = (int8.STEP, int8.STEP_SQUARED, tile.m, tile.n, tile.k, OUTLIERS, tile.group)
        tail = (CAPACITY if gathered else 0, at_once, word_rows, False, split, full, bias)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        if tile.kind == "tma":
            programs = min(tiles, gpu_of(index).multiprocessors) if tile.persistent else 0
            self._tma = [tile.m, tile.k], [tile.n, tile.k]
            constants = (*head, *tail, programs)
            self._product = _Step(_int8_product_tma_kernel, programs or tiles, numbers, constants, **options)
        else:
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
        places = x.data_ptr(), CB.data_ptr(), SCB.data_ptr(), _address(bias), _address(full), out.data_ptr()
        together = 0
        for place in places:
            together |= place or 0
        aligned = together % ALIGNMENT == 0
        if self._one:
            if aligned and self._product.ready():
                a, b, c, d, _, f = places
                self._product.direct(self._index, a, b, f, d, c, threshold)
            else:
                words = CB if CB.data_ptr() % 4 == 0 else CB.clone()
                self._product.ordinary(aligned, x, words.view(torch.int32), out, bias, SCB, threshold)
        elif self._quad:
            self._run_few(x, CB, SCB, threshold, bias, full, out, places, aligned)
        else:
            self._run_many(x, CB, SCB, threshold, bias, full, out, places, aligned)

    def _run_few(
        self, x: Tensor, CB: Tensor, SCB: Tensor, threshold: float, bias: Tensor | None, full: Tensor | None,
        out: Tensor, places: tuple[int | None, ...], aligned: bool,
    ) -> None:  # fmt: skip
        step = self._product
        if aligned and step.ready():
            a, b, c, d, e, f = places
            step.direct(self._index, a, b, f, d, c, e, threshold)
        else:
            if CB.data_ptr() % 4:
                CB = CB.clone()
            step.ordinary(aligned, x, CB.view(torch.int32), out, bias, SCB, full, threshold)

    def _run_many(
        self, x: Tensor, CB: Tensor, SCB: Tensor, threshold: float, bias: Tensor | None, full: Tensor | None,
        out: Tensor, places: tuple[int | None, ...], aligned: bool,
    ) -> None:  # fmt: skip
        memory = self._memory.allocate(x.device)
        if self._shared:
            begin, end = self._memory.range_of(0)
            memory[begin:end].zero_()
        split = threshold > 0
        if aligned and self._product.ready():
            x_at, weight_at, scales_at, bias_at, full_at, out_at = places
            words, codes, absmax, apart_x, apart_weight, count = self._memory.addresses(memory)
            self._rows.direct(self._index, x_at, codes, absmax, words, threshold)
            if self._gather is not None:
                self._gather.direct(self._index, words, x_at, weight_at, apart_x, apart_weight, count, threshold)
            given = x_at if split else None
            rest = (weight_at, out_at, bias_at, absmax, scales_at, given, full_at, words, apart_x, apart_weight, count)
            if self._tma is None:
                self._product.direct(self._index, codes, *rest, threshold)
            else:
                self._product.direct(self._index, *self._descriptors(memory, CB), *rest, threshold)
            return
        words, codes, absmax, apart_x, apart_weight, count = self._memory.tensors(memory)
        self._rows.ordinary(aligned, x, codes, absmax, words, threshold)
        if self._gather is not None:
            self._gather.ordinary(aligned, words, x, CB, apart_x, apart_weight, count, threshold)
        given = x if split else None
        first = (codes,) if self._tma is None else self._descriptors(memory, CB)
        rest = (CB, out, bias, absmax, SCB, given, full, words, apart_x, apart_weight, count)
        self._product.ordinary(aligned, *first, *rest, threshold)

    def _descriptors(self, memory: Tensor, CB: Tensor) -> tuple[Any, Any]:
        from triton.tools.tensor_descriptor import TensorDescriptor

        assert self._tma is not None
        codes = self._memory.tensors(memory)[1]
        return TensorDescriptor.from_tensor(codes, self._tma[0]), TensorDescriptor.from_tensor(CB, self._tma[1])


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
    if tile.kind != "pointer":
        tile = Tile("pointer", tile.m, tile.n, tile.k, tile.group, tile.warps, tile.stages)
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
