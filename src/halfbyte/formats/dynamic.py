"""Dynamic maps: a decimal exponent by unary prefix, the rest a linear fraction.

Source: Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, 2015 (arXiv:1511.04561).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from halfbyte.formats.spacing import linspace32

__all__ = ["dynamic_map"]


def dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> npt.NDArray[np.float32]:
    """Sorted fp32 values of the dynamic data type, shape ``(256,)``; unused places are zero.

    For exponent ``i`` the values are the middles of ``2**i`` equal parts of [0.1, 1] (signed; twice as many unsigned),
    times ``10**(i - max_exponent_bits + 1)``; then 0 and 1. For fewer than 8 bits, zeros fill up to 256.

    >>> m = dynamic_map()
    >>> m.shape, float(m[127]), float(m[-1]), float(m[0])
    ((256,), 0.0, 1.0, -0.992968738079071)
    """
    values: list[npt.NDArray[np.float32]] = []
    non_sign_bits = total_bits - 1
    extra = 2 ** (non_sign_bits - max_exponent_bits) - 1
    for exponent in range(max_exponent_bits):
        steps = 2 ** (exponent + non_sign_bits - max_exponent_bits) + 1 if signed else 0
        if not signed:
            steps = 2 ** (exponent + non_sign_bits - max_exponent_bits + 1) + 1
        means = _middles(int(steps)) * np.float32(10.0 ** (exponent - max_exponent_bits + 1))
        values += [means, -means] if signed else [means]
    if extra > 0:
        means = _middles(int(extra) + 1)
        values += [means, -means] if signed else [means]
    values.append(np.asarray([0.0, 1.0], np.float32))
    found = np.concatenate(values)
    return np.sort(np.concatenate([found, np.zeros(256 - found.size, np.float32)]))


def _middles(points: int) -> npt.NDArray[np.float32]:
    edges = linspace32(0.1, 1.0, points)
    return ((edges[:-1] + edges[1:]) / np.float32(2.0)).astype(np.float32)
