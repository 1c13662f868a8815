"""Which tile the experts' product runs with."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from halfbyte.backends.triton.device import Gpu

__all__ = ["GroupedTile", "tile_for"]


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
    batch = 8 if each <= 8 else 16 if each <= 16 else 32
    unroll = 4 if k >= 1024 else 2
    return GroupedTile(batch, 16 if batch == 8 else 32, unroll, 4, 1, 1 if batch < 32 else 0)
