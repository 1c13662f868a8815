"""The rank of an fp32 value among the midpoints of an 8-bit map, by one table entry and one comparison of integers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Ranks", "ranks"]


@dataclass(frozen=True)
class Ranks:
    """A table over runs of fp32 values.

    The bits of an fp32 value, with those of negative values turned around, rise with the value as a signed integer.
    Its high part (shifted right by ``shift``) is the key of a run, which at most one midpoint cuts. The entry holds the
    rank below the cut in 8 bits, and above them the low bits of the midpoint: a value with larger ones is one higher.

    Attributes:
        table: uint32 for each key from ``low`` to ``high``.
        low: Smallest key.
        high: Largest key: that of 1.
        shift: Low bits.
    """

    table: npt.NDArray[np.uint32]
    low: int
    high: int
    shift: int


def _rising(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    bits = values.view(np.int32)
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)


_NEVER = (1 << 24) - 1


@functools.lru_cache(maxsize=64)
def ranks(code: bytes) -> Ranks | str:
    """Table for a map of 256 rising fp32 values, given as their bytes; a reason if there is none.

    >>> from halfbyte.formats.dynamic import dynamic_map
    >>> found = ranks(dynamic_map().tobytes())
    >>> found.table.shape, found.shift
    ((16258,), 17)
    """
    values = np.frombuffer(code, np.float32)
    if not np.isfinite(values).all() or (np.diff(values) <= 0).any():
        return "the code map does not rise from value to value"
    midpoints = _rising(((values[:-1] + values[1:]) * np.float32(0.5)).astype(np.float32))
    for shift in range(19, 14, -1):
        keys = midpoints >> shift
        if (np.diff(keys) > 0).all():
            return _filled(midpoints, keys, shift)
    return "the code map has values too close together for one comparison each"


def _filled(midpoints: npt.NDArray[np.int64], keys: npt.NDArray[np.int64], shift: int) -> Ranks:
    # One more run at either end, uncut: what lies beyond is held to it.
    low, high = int(keys[0]) - 1, max(int(keys[-1]), 0x3F800000 >> shift) + 1
    below = np.searchsorted(keys, np.arange(low, high + 1), side="left")
    entries = (_NEVER << 8 | below).astype(np.int64)
    entries[keys - low] = ((midpoints & ((1 << shift) - 1)) << 8) | np.arange(midpoints.size)
    return Ranks(entries.astype(np.uint32), low, high, shift)
