"""Normal maps: quantiles of the normal distribution, the construction behind NF4."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from halfbyte.formats.spacing import linspace32

__all__ = ["normal_map"]


def normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> npt.NDArray[np.float32]:
    """Sorted fp32 values divided by the largest, shape ``(256,)``: 15 or 16 quantiles, the rest zero.

    Args:
        offset: Probability of the outermost quantile.
        use_extra_value: One value more on the positive side (16 values instead of 15).

    >>> m = normal_map()
    >>> float(m[0]), float(m[-1]), int((m != 0).sum())
    (-1.0, 1.0, 15)
    """
    quantile = NormalDist().inv_cdf
    positive = [quantile(float(p)) for p in linspace32(offset, 0.5, 9 if use_extra_value else 8)[:-1]]
    negative = [-quantile(float(p)) for p in linspace32(offset, 0.5, 8)[:-1]]
    values = np.asarray(positive + negative + [0.0] * (256 - len(positive) - len(negative)), np.float32)
    values = np.sort(values)
    return (values / values.max()).astype(np.float32)
