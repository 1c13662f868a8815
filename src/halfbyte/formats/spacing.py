"""Equally spaced fp32 points with the rounding that stored maps were made with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["linspace32"]


def linspace32(start: float, end: float, points: int) -> npt.NDArray[np.float32]:
    """fp32 points from ``start`` to ``end``, counted from the nearer end, each rounded once (torch.linspace on AVX2).

    >>> linspace32(0.0, 1.0, 3).tolist()
    [0.0, 0.5, 1.0]
    """
    first, last = np.float32(start), np.float32(end)
    step = np.float64(np.float32((last - first) / np.float32(max(points - 1, 1))))
    index = np.arange(points)
    up = np.float64(first) + step * index
    down = np.float64(last) - step * index[::-1]
    return np.where(index < points // 2, up, down).astype(np.float32)
