"""FP8-like maps of any exponent and precision split, scaled to a largest value of 1."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from halfbyte.errors import ArgumentError

__all__ = ["fp8_map"]


def fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> npt.NDArray[np.float32]:
    """Sorted fp32 values divided by the largest, shape ``(256,)``; fewer than 8 bits are filled up with zeros.

    The exponent of these maps falls as its bits rise; that is what stored maps hold. The set of values is the same.

    Raises:
        ArgumentError: The bits do not add up.

    >>> m = fp8_map(True, 4, 3)
    >>> float(m[0]), float(m[-1]), int(np.unique(m).size)
    (-1.0, 1.0, 255)
    """
    sign_bits = 1 if signed else 0
    if exponent_bits + precision_bits + sign_bits != total_bits:
        raise ArgumentError(
            f"{exponent_bits} exponent and {precision_bits} precision bits with {sign_bits} sign bit",
            expected=f"a sum of total_bits={total_bits}",
        )
    bias = 2 ** (exponent_bits - 1)
    values: list[float] = []
    for exponent in range(2**exponent_bits):
        for bits in itertools.product((0, 1), repeat=precision_bits):
            fraction = sum(bit * 2.0 ** -(i + 1) for i, bit in enumerate(bits))
            value = fraction * 2.0**-bias if exponent == 0 else (1 + fraction) * 2.0 ** -(exponent - bias - 1)
            values += [value, -value] if signed else [value]
    values += [0.0] * (256 - len(values) if total_bits < 8 else 0)
    table = np.sort(np.asarray(values, np.float32))
    return (table / table.max()).astype(np.float32)
