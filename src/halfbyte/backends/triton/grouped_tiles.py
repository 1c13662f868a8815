"""Which tile the experts' product runs with: measured per architecture in ``tuning/experts_*.json``, else by a rule."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from typing import Any

from halfbyte.backends.triton.device import Gpu
from halfbyte.backends.triton.tuning import shipped

__all__ = ["SLICED_FROM", "GroupedTile", "read", "rule", "tile_for"]

SLICED_FROM = {True: 96, False: 1}
"""Rows an expert, on average, beyond which slices of dequantized weights are faster: than the Gluon kernel, than the
portable one."""


@dataclass(frozen=True)
class GroupedTile:
    """One configuration of the grouped kernel, in the small-batch kernel's words (:class:`tuning.Tile`).

    Attributes:
        batch: Rows of one expert of a program (BM).
        rows: Weight rows of a program (BN).
        unroll: Groups of 64 columns in an iteration (U).
        k_warps: Warps that share the K axis (KW).
        n_warps: Warps that share the rows (NW).
        ahead: Whether the weight is loaded one iteration ahead.
        halves: Whether a tile of at most half its rows is computed as one of half the size (16 rows or more).
    """

    batch: int
    rows: int
    unroll: int
    k_warps: int
    n_warps: int
    ahead: int
    halves: bool = False


@dataclass(frozen=True)
class Entry:
    """A measured choice: the fastest tile for about ``rows_each`` rows an expert at that K."""

    rows_each: float
    k: int
    tile: GroupedTile


@functools.lru_cache(maxsize=16)
def read(arch: str) -> tuple[Entry, ...]:
    """The measured choices of an architecture; none where none was measured."""
    text = shipped(f"experts_{arch}")
    if text is None:
        return ()
    document: dict[str, Any] = json.loads(text)
    return tuple(
        Entry(float(item["rows_each"]), int(item["k"]), GroupedTile(**item["tile"])) for item in document["tiles"]
    )


@functools.lru_cache(maxsize=4096)
def tile_for(gpu: Gpu, rows: int, count: int, k: int) -> GroupedTile:
    """The tile for ``rows`` products with ``count`` experts of K columns: the nearest measured one that K fills."""
    each = rows / count
    near = [entry for entry in read(gpu.arch) if k >= 64 * entry.tile.k_warps * entry.tile.unroll]
    if not near:
        return rule(each, k)
    # Twice the rows matter as much as twice the columns: first the batch, then the length of K.
    return min(near, key=lambda e: (abs(math.log2(each / e.rows_each)) + abs(math.log2(k / e.k)), e.rows_each)).tile


def rule(each: float, k: int) -> GroupedTile:
    """A tile for any GPU: that of :func:`tile_for` where nothing was measured.

    >>> rule(0.25, 4096).rows, rule(40, 4096).batch
    (32, 32)
    """
    unroll = 4 if k % 512 == 0 else 2
    if each <= 8:
        return GroupedTile(8, 32, unroll, 2, 2, 1)
    return GroupedTile(16, 32, unroll, 2, 2, 1) if each <= 32 else GroupedTile(32, 64, 2, 2, 4, 0)
