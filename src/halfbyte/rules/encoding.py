"""Which code a new 8-bit state gets: the nearest; but where states are never negative, only zero gets that of zero."""

from __future__ import annotations

from typing import Any

__all__ = ["encoding_map"]


def encoding_map(code: Any) -> Any:
    """The map whose midpoints separate the codes of new states; they are decoded with ``code`` itself.

    The nearest code of a square below 1.6e-7 of its block's largest would be that of zero, and Adam would divide its
    mean by a root of zero. So in a map that begins at zero, whatever lies above zero gets a code above it: the first
    midpoint is zero, as that between ``-x`` and ``x`` is. Maps that begin below zero stay: means may be zero.

    Args:
        code: A rising map, fp32 ``(256,)``: an array or a tensor, on whose device it stays.

    Returns:
        A new map of the same kind.

    >>> import numpy as np
    >>> encoding_map(np.float32([0, 0.25, 1])).tolist(), encoding_map(np.float32([-1, 0, 1])).tolist()
    ([-0.25, 0.25, 1.0], [-1.0, 0.0, 1.0])
    """
    made = code * 1
    made[:1] -= code[1:2] * (code[:1] == 0)
    return made
