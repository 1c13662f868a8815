"""Uninitialised memory that shows: what torch allocates and nobody writes is NaN, or the largest integer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["poisoned"]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch's own switch for it, which comes with deterministic algorithms; what has none only warns."""
    mode, fills = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fills
