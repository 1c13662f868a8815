"""Memory for large results: the same ``torch.empty``, with huge pages asked for, as numpy does for its arrays.

A fresh tensor of some megabytes is mapped page by page at its first write. With pages of 4 KiB that costs more than
decoding into it; with pages of 2 MiB it costs little. Asking changes nothing where the system has none.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["empty", "maker"]

LARGE = 4 << 20
"""Bytes from which it pays: two huge pages."""


@functools.lru_cache(maxsize=1)
def _madvise() -> Any:
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes, advise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return advise


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor."""
    return maker(tuple(shape), dtype)()


@functools.lru_cache(maxsize=1024)
def maker(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], Tensor]:
    """What makes such tensors, kept: a small product takes little longer than working out how."""
    if math.prod(shape) * dtype.itemsize >= LARGE:
        return functools.partial(_large, shape, dtype)
    # An empty dimension counts as one, as in torch.
    strides = tuple(math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape)))
    return functools.partial(torch.empty_strided, shape, strides, dtype=dtype)


def _large(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    made = torch.empty(shape, dtype=dtype)
    if (advise := _madvise()) is not None:
        end, start = made.data_ptr() + made.nbytes, -(-made.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # Advice only: where it is refused (a kernel without huge pages), nothing is lost.
        advise(start, (end - start) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return made
