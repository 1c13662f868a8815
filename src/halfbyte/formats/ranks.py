"""The rank of an fp32 value among the midpoints of an 8-bit map, by one table entry and one sum of integers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Ranks", "ranks"]


@dataclass(frozen=True)
class Ranks:
    """A table over runs of fp32 values.

    A run is what values with the same bits above the ``shift`` lowest are: at most one midpoint cuts it. The entry is
    the rank below the cut, shifted left by ``shift``, plus what makes the low bits of a value above the cut carry: so
    ``(table[bits >> shift] + low bits) >> shift`` is the rank. Low bits of negative values are inverted first, so that
    they rise with the value. All bit patterns have an entry: nothing is out of reach. NaN has rank 0.

    Attributes:
        table: uint32 ``(2**(32 - shift),)``.
        shift: Low bits.
        signed: Whether midpoints lie below zero; otherwise low bits need not be inverted.
    """

    table: npt.NDArray[np.uint32]
    shift: int
    signed: bool


def _rising(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Integers that rise with the value: its bits, those of negative values turned around."""
    bits = (values + np.float32(0)).view(np.int32)  # no -0
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)


_INFINITY = 0x7F800000


@functools.lru_cache(maxsize=64)
def ranks(code: bytes) -> Ranks | str:
    """Table for a map of 256 rising fp32 values, given as their bytes; a reason if there is none.

    >>> from halfbyte.formats.dynamic import dynamic_map
    >>> found = ranks(dynamic_map().tobytes())
    >>> found.table.shape, found.shift, found.signed
    ((32768,), 17, True)
    >>> bits = int(np.float32(0.3).view(np.int32))
    >>> int(found.table[bits >> 17] + bits % 2**17) >> 17, int(abs(dynamic_map() - 0.3).argmin())
    (205, 205)
    """
    values = np.frombuffer(code, np.float32)
    if not np.isfinite(values).all() or (np.diff(values) <= 0).any():
        return "the code map does not rise from value to value"
    midpoints = _rising(((values[:-1] + values[1:]) * np.float32(0.5)).astype(np.float32))
    for shift in range(19, 14, -1):
        keys = midpoints >> shift
        if (np.diff(keys) > 0).all():
            return Ranks(_filled(midpoints, keys, shift), shift, bool(midpoints[0] < 0))
    return "the code map has values too close together for one comparison each"


def _filled(midpoints: npt.NDArray[np.int64], keys: npt.NDArray[np.int64], shift: int) -> npt.NDArray[np.uint32]:
    half = 1 << (31 - shift)
    entries = np.searchsorted(keys, np.arange(-half, half), side="left") << shift
    entries[keys + half] += (1 << shift) - 1 - (midpoints & ((1 << shift) - 1))
    entries[(_INFINITY >> shift) + half :] = 0
    # Bits of negative values fall as the value rises.
    return np.concatenate([entries[half:], entries[:half][::-1]]).astype(np.uint32)
