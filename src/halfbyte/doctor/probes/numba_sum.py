"""The smallest function that numba must compile."""

from __future__ import annotations

import numba

__all__ = ["sum_of_squares"]


@numba.njit
def sum_of_squares(count: int) -> int:
    """Sum of ``i * i`` for ``i`` below ``count``."""
    total = 0
    for i in range(count):
        total += i * i
    return total
