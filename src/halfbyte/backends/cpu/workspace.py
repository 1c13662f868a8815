"""Memory that a call needs for itself, kept from call to call."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from halfbyte.backends.cpu import memory

__all__ = ["workspace"]


class _Workspaces(threading.local):
    def __init__(self) -> None:
        self.held: dict[torch.dtype, Tensor] = {}


_workspaces = _Workspaces()


def workspace(numel: int, dtype: torch.dtype) -> Tensor:
    """A tensor of ``numel`` elements with any content: one for each dtype and Python thread, as large as ever asked."""
    found = _workspaces.held.get(dtype)
    if found is None or found.numel() < numel:
        with torch.inference_mode(False):
            found = _workspaces.held[dtype] = memory.empty((numel,), dtype)
    return found[:numel]
