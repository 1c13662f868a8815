"""Launcher of the 4-bit products whose weight is decoded by warps of its own (Hopper): large batches, the backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from halfbyte.backends.triton.dequantize import Nested
from halfbyte.backends.triton.kernels.gemm_portable import _sum_partial_kernel
from halfbyte.backends.triton.launch import Launcher, raw_stream
from halfbyte.backends.triton.tuning import STEP, Tile
from halfbyte.formats.codebook import codebook

__all__ = ["DecodedPlan", "decoded_kernel"]

PRODUCERS = 4
"""Warps that decode."""


@functools.lru_cache(maxsize=1)
def decoded_kernel() -> tuple[Any, Any, Any] | None:
    """The kernel, the class of its activation's descriptor and that one's layout; None where this Triton lacks them."""
    try:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from halfbyte.backends.triton.kernels.gemm_decoded import _gemm_4bit_decoded_kernel

        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    except (ImportError, AttributeError):
        return None
    return _gemm_4bit_decoded_kernel, TensorDescriptor, layout


def registers(tile: Tile) -> tuple[int | None, int]:
    """Registers a thread at launch (None: Triton's own choice, one program a multiprocessor), and of a decoding one.

    >>> registers(Tile("decoded", 128, 128, 2, 1, 4, 1, 3, per_sm=2))
    (128, 88)
    """
    relaying = 4 if tile.relay else 0  # one warp, and three that make up a warpgroup with it
    warps = tile.n_warps + PRODUCERS + relaying
    each = min(256, 65536 // (tile.per_sm * 32 * warps) // 8 * 8)
    # Accumulators, and what addresses and the write-out take beside them.
    multiplying = -(-(tile.rows * tile.batch // (32 * tile.n_warps) + 40) // 8) * 8
    left = each * warps - multiplying * tile.n_warps - 24 * relaying
    decoding = min(152, left // PRODUCERS // 8 * 8)
    return (each if tile.per_sm > 1 else None), decoding


class DecodedPlan:
    """All that such a product needs and that does not change from call to call.

    Attributes:
        split: Partial products that a second kernel sums.
    """

    __slots__ = ("_block", "_descriptor", "_grid", "_launcher", "_layout", "_numbers", "_sum", "m", "split", "width")

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
        kernel, self._descriptor, self._layout = found
        terms, self.width = (n, k) if across else (k, n)
        steps = -(-terms // STEP)
        per_slice = -(-steps // tile.split)
        self.m, self.split = m, -(-steps // per_slice)
        levels = tuple(float(level) for level in codebook(quant_type).table)
        self._numbers = (*levels, m, n, k, k // 8, k // blocksize, steps, per_slice)
        self._grid = (-(-self.width // tile.rows), self.split, -(-m // tile.batch))
        self._block = [tile.batch, STEP]
        maxnreg, decoding = registers(tile)
        constants = (
            tile.rows, tile.batch, blocksize, across, self.split, nested, bias and self.split == 1, tile.n_warps,
            PRODUCERS, decoding, tile.unroll, tile.relay, tile.stages,
        )  # fmt: skip
        options = {} if maxnreg is None else {"maxnreg": maxnreg}
        self._launcher = Launcher(kernel, constants, num_warps=tile.n_warps, enable_fp_fusion=False, **options)
        sum_constants = (self.split, 1024, bias)
        self._sum = Launcher(_sum_partial_kernel, sum_constants, num_warps=4) if self.split > 1 else None

    def run(
        self, x: Tensor, packed: Tensor, absmax: Tensor, nested: Nested, bias: Tensor | None, out: Tensor, index: int
    ) -> None:
        """``out = x @ weight.T + bias``, or ``x @ weight``, on the current stream of device ``index``, which is
        current."""
        partial = out
        if self._sum is not None:
            partial = torch.empty((self.split, self.m, self.width), dtype=torch.float32, device=out.device)
        m, terms = x.shape
        stride = terms if m == 1 else x.stride(0)
        if stride < terms:  # rows that overlap, as of an expanded one
            x, stride = x.contiguous(), terms
        rows = self._descriptor(x, [m, terms], [stride, 1], self._block, self._layout)
        if self._launcher.compiled():
            a, b, c = nested
            self._launcher.direct(
                self._grid,
                raw_stream(index),
                packed.data_ptr(),
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
            self._launcher.ordinary(self._grid, packed, rows, absmax, *nested, bias, partial, *self._numbers)
        if self._sum is not None:
            sum_partial(self._sum, partial, bias, out, index)


def sum_partial(launcher: Launcher, partial: Tensor, bias: Tensor | None, out: Tensor, index: int) -> None:
    """``out = partial.sum(0) + bias`` by the launcher of the summing kernel."""
    numel, width = partial[0].numel(), partial.shape[2]
    grid = (-(-numel // 1024), 1, 1)
    if launcher.compiled():
        address = None if bias is None else bias.data_ptr()
        launcher.direct(grid, raw_stream(index), partial.data_ptr(), address, out.data_ptr(), numel, width)
    else:
        launcher.ordinary(grid, partial, bias, out, numel, width)
