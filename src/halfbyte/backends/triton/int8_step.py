"""What int8 plans are made of: kernels with numbers that do not change from call to call, and memory between them."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from halfbyte.backends.triton.kernels.int8 import _int8_rows_kernel
from halfbyte.backends.triton.launch import ALIGNMENT, Launcher, raw_stream, start

__all__ = ["Memory", "Step", "address", "aligned_addresses", "rows_step"]


class Step:
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

    def opened(self) -> tuple[Any, int, tuple[Any, ...], tuple[Any, ...]]:
        """``(run, grid, head, tail)`` of a compiled kernel: ``run(grid, 1, 1, stream, *head, *addresses, *tail)``."""
        run, head = self._launcher.opened()
        return run, self._grid[0], head, (*self._numbers, *self._constants)

    def repeated(self, index: int, shape: tuple[int, ...], between: tuple[Tensor | None, ...], *numbers: Any) -> Any:
        """:meth:`Launcher.repeated` of a kernel that takes the activation, ``between``, the result, and numbers."""
        return self._launcher.repeated(self._grid, index, shape, (), between, (), (*numbers, *self._numbers))


def rows_step(rows: int, k: int, x_stride: int, split: bool, shared: bool) -> Step:
    """Codes and absmax of rows; the kernel's parameters up to the threshold are given in each call."""
    block = max(128, min(4096, triton.next_power_of_2(k)))
    options = {"num_warps": 8 if block >= 2048 else 4, "enable_fp_fusion": False}
    return Step(_int8_rows_kernel, rows, (k, x_stride), (split, shared, block), **options)


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor begins."""
    return None if tensor is None else tensor.data_ptr()


def aligned_addresses(*places: int | None) -> bool:
    """Whether all that are there lie where kernels may load widely."""
    together = 0
    for place in places:
        together |= place or 0
    return together % ALIGNMENT == 0


class Memory:
    """Tensors between the kernels of one call, in one allocation; None for those that are not there.

    Attributes:
        size: Bytes.
        offsets: Bytes to each part.
    """

    __slots__ = ("_parts", "offsets", "size")

    def __init__(self, *parts: tuple[tuple[int, ...], torch.dtype] | None) -> None:
        self._parts = parts
        self.offsets: list[int | None] = []
        self.size = 0
        for part in parts:
            self.offsets.append(None if part is None else self.size)
            if part is not None:
                self.size += -(-torch.Size(part[0]).numel() * part[1].itemsize // 256) * 256

    def addresses(self, memory: Tensor) -> list[int | None]:
        base = memory.data_ptr()
        return [None if offset is None else base + offset for offset in self.offsets]

    def tensors(self, memory: Tensor) -> list[Tensor | None]:
        """The parts of ``memory``, which is uint8."""
        found: list[Tensor | None] = []
        for part, offset in zip(self._parts, self.offsets, strict=True):
            if part is None or offset is None:
                found.append(None)
                continue
            nbytes = torch.Size(part[0]).numel() * part[1].itemsize
            found.append(memory[offset : offset + nbytes].view(part[1]).view(part[0]))
        return found
