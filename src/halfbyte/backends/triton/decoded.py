"""Launcher of the 4-bit products whose weight is decoded by warps of its own (Hopper): large batches, the backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from halfbyte.backends.triton.dequantize import Nested
from halfbyte.backends.triton.launch import ALIGNMENT, Launcher, allocation, on_its_device, raw_stream
from halfbyte.backends.triton.partial_sum import PartialSum
from halfbyte.backends.triton.tuning import STEP, Tile
from halfbyte.formats.codebook import codebook

__all__ = ["DecodedPlan", "decoded_kernel"]

WARPS = 4
"""Warps of a producer."""


@functools.lru_cache(maxsize=1)
def decoded_kernel() -> tuple[Any, ...] | None:
    """The kernel, its tensors' descriptor class, and layouts of the activation and of packed words in lines of 64 and
    of 128 bytes; None where this Triton lacks them."""
    try:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from halfbyte.backends.triton.kernels.gemm_decoded import _gemm_4bit_decoded_kernel

        layouts = [gl.NVMMASharedLayout(line, bits, rank=2) for line, bits in ((128, 16), (64, 32), (128, 32))]
    except (ImportError, AttributeError):
        return None
    return (_gemm_4bit_decoded_kernel, TensorDescriptor, *layouts)


def registers(tile: Tile) -> int:
    """Registers a thread of a producer.

    >>> registers(Tile("decoded", 256, 128, 4, 1, 8, 1, 4))
    152
    """
    decoding = tile.producers * WARPS
    warps = tile.n_warps + decoding
    each = min(256, 65536 // (32 * warps) // 8 * 8)
    # Accumulators, and what addresses and the write-out take beside them.
    multiplying = -(-(tile.rows * tile.batch // (32 * tile.n_warps) + 40) // 8) * 8
    return min(152, (each * warps - multiplying * tile.n_warps) // decoding // 8 * 8)


class DecodedPlan:
    """All that such a product needs and that does not change from call to call."""

    __slots__ = (
        "_block", "_descriptor", "_grid", "_launcher", "_layout", "_numbers", "_sizes", "_sum", "_words",
    )  # fmt: skip

    def __init__(
        self,
        m: int,
        n: int,
        k: int,
        blocksize: int,
        quant_type: str,
        tile: Tile,
        *,
        across: bool,
        nested: bool,
        bias: bool,
    ) -> None:
        found = decoded_kernel()
        if found is None:
            raise RuntimeError(f"Triton {triton.__version__} has no Gluon that halfbyte knows")
        kernel, self._descriptor, self._layout, lines_64, lines_128 = found
        terms, width = (n, k) if across else (k, n)
        steps, group = -(-terms // STEP), tile.unroll
        per_slice = -(-steps // (tile.split * group))
        split = -(-steps // (per_slice * group))
        self._sizes = [m, terms]
        levels = tuple(float(level) for level in codebook(quant_type).table)
        self._numbers = (*levels, m, n, k, k // blocksize, steps, per_slice)
        self._grid = (-(-width // tile.rows), split, -(-m // tile.batch))
        self._block = [tile.batch, STEP]
        box = [STEP * group, 16] if across else [tile.rows, 8 * group]
        self._words = ([n, k // 8], [k // 8, 1], box, lines_64 if box[1] == 16 else lines_128)
        whole = not across and blocksize == STEP and steps % group == 0
        constants = (
            tile.batch, blocksize, across, split > 1, nested, bias and split == 1, whole,
            width % 8 == 0, tile.n_warps, registers(tile), tile.stages, group, tile.producers,
        )  # fmt: skip
        self._launcher = Launcher(kernel, constants, num_warps=tile.n_warps, enable_fp_fusion=False)
        self._sum = PartialSum((split, m, width), bias=bias) if split > 1 else None

    def run(
        self, x: Tensor, packed: Tensor, absmax: Tensor, nested: Nested, bias: Tensor | None, out: Tensor, index: int
    ) -> None:
        """``out = x @ weight.T + bias``, or ``x @ weight``, on the current stream of device ``index``, which is
        current."""
        partial = out
        if self._sum is not None:
            partial = torch.empty(self._sum.shape, dtype=torch.float32, device=out.device)
        m, terms = x.shape
        stride = terms if m == 1 else x.stride(0)
        if stride < terms:  # rows that overlap, as of an expanded one
            x, stride = x.contiguous(), terms
        rows = self._descriptor(x, [m, terms], [stride, 1], self._block, self._layout)
        words = self._descriptor(packed.view(-1).view(torch.int32), *self._words)
        if self._launcher.compiled():
            a, b, c = nested
            self._launcher.direct(
                self._grid,
                raw_stream(index),
                words,
                rows,
                absmax.data_ptr(),
                None if a is None else a.data_ptr(),
                None if b is None else b.data_ptr(),
                None if c is None else c.data_ptr(),
                None if bias is None else bias.data_ptr(),
                partial.data_ptr(),
                *self._numbers,
            )
        else:
            self._launcher.ordinary(self._grid, words, rows, absmax, *nested, bias, partial, *self._numbers)
        if self._sum is not None:
            self._sum.run(partial, bias, out, index)

    def repeated(
        self, packed: Tensor, absmax: Tensor, nested: Nested, bias: Tensor | None, shape: tuple[int, ...], index: int
    ) -> Callable[[Tensor], Tensor | None] | None:
        """``run`` with these tensors as they lie, for other contiguous activations; None where nothing ran yet."""
        launch = self._launcher.bound(self._grid, index, (), self._numbers)
        summed = None if self._sum is None else self._sum.bound(index)
        if launch is None or (summed is None and self._sum is not None):
            return None
        added = None if bias is None else bias.data_ptr()
        scales = [None if tensor is None else tensor.data_ptr() for tensor in (absmax, *nested)]
        empty = allocation(shape)
        partial = empty if self._sum is None else allocation(self._sum.shape, torch.float32)
        words = self._descriptor(packed.view(-1).view(torch.int32), *self._words)
        words.base = _Place(packed.data_ptr())  # the weight itself is not to be kept alive
        kind, sizes = self._descriptor, self._sizes
        settings: dict[str, Any] | None = None

        def call(x: Tensor) -> Tensor | None:
            nonlocal settings
            address = x.data_ptr()
            if address % ALIGNMENT:
                return None
            if settings is None:  # the checks of shapes, once: they take longer than all else here
                checked = kind(x.view(sizes), sizes, [sizes[1], 1], self._block, self._layout)
                settings = {**vars(checked), "base": None}
            rows = kind.__new__(kind)
            vars(rows).update(settings, base=_Place(address))
            out = empty(x)
            parts = out if summed is None else partial(x)
            launch(words, rows, *scales, added, parts.data_ptr())
            if summed is not None:
                summed(parts.data_ptr(), added, out.data_ptr())
            return out

        return on_its_device(call, index)


class _Place:
    """What a descriptor that was checked needs of its tensor."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address
