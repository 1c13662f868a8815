"""Memory that a call needs for itself, kept from call to call: one block for each Python thread."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from halfbyte.backends.cpu import memory

__all__ = ["ALIGNMENT", "scratch", "workspace"]

ALIGNMENT = 64
_KEPT_BYTES = 1 << 20
"""A block is never smaller, so that calls of about the same size share one."""


class _Held(threading.local):
    def __init__(self) -> None:
        self.block = torch.empty(0, dtype=torch.uint8)
        self.start = self.size = 0


_held = _Held()


def _grow(nbytes: int) -> None:
    with torch.inference_mode(False):
        _held.block = memory.empty((max(nbytes, _KEPT_BYTES) + ALIGNMENT,), torch.uint8)
    _held.start = -(-_held.block.data_ptr() // ALIGNMENT) * ALIGNMENT
    _held.size = _held.block.numel() - ALIGNMENT


def scratch(nbytes: int) -> int:
    """Address of that much memory of any content, aligned to a cache line; a thread's next call uses it again."""
    if _held.size < nbytes:
        _grow(nbytes)
    return _held.start


def workspace(numel: int, dtype: torch.dtype) -> Tensor:
    """The same as a tensor."""
    start = scratch(numel * dtype.itemsize) - _held.block.data_ptr()
    return _held.block[start : start + numel * dtype.itemsize].view(dtype)
