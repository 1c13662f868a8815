"""Linear maps: equal steps over [-1, 1] or [0, 1]."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from halfbyte.formats.spacing import linspace32

__all__ = ["linear_map"]


def linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> npt.NDArray[np.float32]:
    """fp32 values in rising order, shape ``(256,)``; unused places in the middle are zero.

    >>> linear_map(total_bits=2)[[0, 1, 127, -1]].tolist()
    [-1.0, 0.0, 0.0, 1.0]
    """
    count = 2**total_bits
    if add_zero or total_bits < 8:
        # A symmetric map that holds zero has one value less.
        count = count - 1 if signed else count
    values = linspace32(-1.0 if signed else 0.0, 1.0, count)
    gap = 256 - values.size
    if gap == 0:
        return values
    half = values.size // 2
    return np.concatenate([values[:half], np.zeros(gap, np.float32), values[half:]])
