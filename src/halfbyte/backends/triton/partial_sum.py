"""The second kernel of a product whose sum is split between programs: it adds their parts, and the bias."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from halfbyte.backends.triton.kernels.gemm_portable import _sum_partial_kernel
from halfbyte.backends.triton.launch import Launcher, raw_stream

__all__ = ["PartialSum"]

BLOCK = 1024
"""Sums of one program."""


class PartialSum:
    """``out = partial.sum(0) + bias``.

    Attributes:
        shape: Of ``partial``, fp32: parts, rows, columns.
    """

    __slots__ = ("_grid", "_launcher", "_numbers", "shape")

    def __init__(self, shape: tuple[int, int, int], *, bias: bool) -> None:
        split, m, width = self.shape = shape
        self._numbers = (m * width, width)
        self._grid = (-(-m * width // BLOCK), 1, 1)
        self._launcher = Launcher(_sum_partial_kernel, (split, BLOCK, bias), num_warps=4)

    def run(self, partial: Tensor, bias: Tensor | None, out: Tensor, index: int) -> None:
        """Fill ``out`` on the current stream of device ``index``, which is current."""
        if self._launcher.compiled():
            address = None if bias is None else bias.data_ptr()
            places = partial.data_ptr(), address, out.data_ptr()
            self._launcher.direct(self._grid, raw_stream(index), *places, *self._numbers)
        else:
            self._launcher.ordinary(self._grid, partial, bias, out, *self._numbers)

    def bound(self, index: int) -> Callable[..., None] | None:
        """``run`` as a function of the addresses of ``partial``, ``bias`` and ``out``; None where nothing ran yet."""
        return self._launcher.bound(self._grid, index, (), self._numbers)
