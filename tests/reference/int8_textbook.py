"""LLM.int8() as the paper writes it (Dettmers et al. 2022, arXiv:2208.07339, sections 2.1 and 3): loops in float64.

Written from the definitions, not from halfbyte's code. Slow on purpose.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["distance", "linear", "outlier_columns", "product", "row_absmax"]

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]


def outlier_columns(A: Array, threshold: float) -> list[int]:
    """Columns in which some row's magnitude reaches the threshold."""
    return [k for k in range(A.shape[1]) if any(abs(A[m, k]) >= threshold for m in range(A.shape[0]))]


def row_absmax(A: Array, threshold: float = np.inf) -> Array:
    """Largest magnitude below the threshold in each row; 0 where there is none."""
    return np.array([max((abs(x) for x in row if not abs(x) >= threshold), default=0.0) for row in A])


def distance(A: Array, absmax: Array, codes: Codes) -> Array:
    """How far ``127 x / absmax`` is from its code; rows whose absmax is 0 count as zeros."""
    size = np.where(absmax == 0, 1.0, absmax)[:, None]
    return np.abs(127 * A / size - codes)


def product(A: Codes, B: Codes) -> list[list[int]]:
    """``A @ B.T`` in Python's own integers."""
    return [[sum(int(a) * int(b) for a, b in zip(x, y, strict=True)) for y in B] for x in A]


def linear(A: Array, CB: Codes, SCB: Array, threshold: float, bias: Array | None, W: Array | None = None) -> Array:
    """Each row by itself: its outliers times the weight as it is, the rest rounded to 127 steps; no other rounding.

    Args:
        A: Activations none of which lies near the middle between two codes.
        CB: The weight's codes.
        SCB: absmax of the weight's rows.
        threshold: 0 for no outliers.
        bias: Added at the end.
        W: The unquantized weight, if outliers are multiplied with that.
    """
    weight = CB * SCB[:, None] / 127
    out = np.zeros((A.shape[0], CB.shape[0]))
    for m, row in enumerate(A):
        apart = set(outlier_columns(row[None], threshold)) if threshold else set()
        absmax = max((abs(x) for k, x in enumerate(row) if k not in apart), default=0.0)
        for n in range(CB.shape[0]):
            for k, x in enumerate(row):
                if k in apart:
                    out[m, n] += x * (weight if W is None else W)[n, k]
                elif absmax > 0:
                    out[m, n] += round(127 * x / absmax) * absmax / 127 * weight[n, k]
    return out if bias is None else out + bias
