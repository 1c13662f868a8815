"""Which tile the experts' product runs with."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from halfbyte.backends.triton.device import Gpu

__all__ = ["SLICED_FROM", "GroupedTile", "tile_for"]

SLICED_FROM = {True: 128, False: 16}
"""Rows an expert, on average, beyond which slices of dequantized weights are faster: than the Gluon kernel, than the
portable one."""


@dataclass(frozen=True)
class GroupedTile:
    """One configuration of the grouped kernel: the small-batch kernel's names (:class:`tuning.Tile`)."""

    batch: int
    rows: int
    unroll: int
    k_warps: int
    n_warps: int
    ahead: int


@functools.lru_cache(maxsize=4096)
def tile_for(gpu: Gpu, rows: int, count: int, n: int, k: int) -> GroupedTile:
    """The tile for ``rows`` products with ``count`` experts of ``n x k``."""
    del gpu, n
    each = rows / count
    if k % 1024:  # few groups of 64 columns: two warps take them all without a rest
        return GroupedTile(8 if each <= 8 else 16, 32, 2, 2, 2, 1)
    if each <= 8:
        return GroupedTile(8, 16 if k > 2048 else 32, 4, 4 if k > 2048 else 2, 1 if k > 2048 else 2, 1)
    return GroupedTile(16, 32, 2, 4, 1, 1) if each <= 16 else GroupedTile(32, 32, 2, 4, 2, 0)
