"""Quantization as a textbook writes it: numpy in float64, one block at a time, brute-force nearest level.

Written from the definitions, not from halfbyte's code: tables too. Slow on purpose.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from tests.support.golden import golden

__all__ = ["FP4", "NF4", "Nearest", "decode", "dynamic", "nearest", "quantiles_of_the_normal", "unpack"]

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]


def quantiles_of_the_normal() -> Array:
    """Dettmers et al., QLoRA (arXiv:2305.14314), section 3: 8 positive and 7 negative quantiles, and zero.

    The published table was computed in fp32: it lies within 6e-7 of this one, and it is what the bytes mean.
    """
    tail = 0.9677083
    quantile = NormalDist().inv_cdf
    positive = [quantile(tail + (0.5 - tail) * i / 8) for i in range(8)]
    negative = [-quantile(tail + (0.5 - tail) * i / 7) for i in range(7)]
    return np.array(sorted([*negative, 0.0, *positive])) / positive[0]


def _fp4() -> Array:
    """Sign, two exponent bits, one mantissa bit, divided by the largest (12); code 0 is 0, code 1 is 1/16 of one."""
    magnitudes = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    return np.array([m / 12 for m in magnitudes] + [-m / 12 for m in magnitudes])


def dynamic(signed: bool) -> Array:
    """Dettmers 2015 (arXiv:1511.04561): decades 10^-6 to 10^0, each with twice the steps of the one below."""
    values = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade if signed else 2 ** (decade + 1)
        width = 0.9 / steps
        for step in range(steps):
            middle = (0.1 + width * (step + 0.5)) * 10.0 ** (decade - 6)
            values += [middle, -middle] if signed else [middle]
    return np.array(sorted(values))


NF4, FP4 = golden("maps")["nf4"].double().numpy(), _fp4()


class Nearest:
    """What the definition says of every value.

    Attributes:
        absmax: Largest magnitude of each block.
        distance: |value / absmax - level| of every value (rows) to every level (columns); zero blocks count as zeros.
        below_zero: Which values are negative.
    """

    def __init__(self, values: Array, blocksize: int, levels: Array) -> None:
        blocks = [values[start : start + blocksize] for start in range(0, len(values), blocksize)]
        self.absmax = np.array([np.abs(block).max() for block in blocks], np.float64)
        relative = [block / size if size > 0 else block * 0.0 for block, size in zip(blocks, self.absmax, strict=True)]
        scaled = np.concatenate([*relative, np.zeros(0)])
        self.distance = np.abs(scaled[:, None] - levels[None, :])
        self.below_zero = values < 0

    def excess(self, codes: Codes) -> Array:
        """How much farther the chosen levels are than the nearest ones."""
        chosen = self.distance[np.arange(len(codes)), codes]
        return chosen - self.distance.min(axis=1) if len(codes) else chosen


def nearest(values: Array, blocksize: int, levels: Array) -> Nearest:
    """Distances of ``values`` (flat) to ``levels``."""
    return Nearest(values, blocksize, levels)


def decode(codes: Codes, absmax: Array, blocksize: int, levels: Array) -> Array:
    """Value by value."""
    return np.array([levels[code] * absmax[i // blocksize] for i, code in enumerate(codes)], np.float64)


def unpack(packed: bytes, numel: int) -> Codes:
    """4-bit codes: element 2i in the high half of byte i, element 2i + 1 in the low half."""
    codes = []
    for byte in packed:
        codes += [byte // 16, byte % 16]
    return np.array(codes[:numel], np.int64)
