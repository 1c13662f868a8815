"""Uninitialised memory that shows: ``torch.empty*`` called from halfbyte comes back full of NaN or 0xA5."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

__all__ = ["POISON_BYTE", "install"]

POISON_BYTE = 0xA5

# The fakes of ops/ make shapes, never memory.
_LEFT_ALONE = ("halfbyte.ops",)


def install(patch: pytest.MonkeyPatch) -> None:
    """Poison every allocation that a halfbyte module asks of torch, until ``patch`` is undone."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        patch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return fresh
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("halfbyte.") and not caller.startswith(_LEFT_ALONE):
            _fill(fresh)
        return fresh

    return poisoned


def _fill(fresh: torch.Tensor) -> None:
    if fresh.device.type == "meta" or fresh.numel() == 0:
        return
    with torch.no_grad():
        if fresh.is_floating_point():
            fresh.fill_(float("nan"))
        elif fresh.dtype == torch.bool:
            fresh.fill_(True)
        elif not fresh.is_complex():
            fresh.fill_(POISON_BYTE if fresh.dtype == torch.uint8 else -POISON_BYTE % 128)
