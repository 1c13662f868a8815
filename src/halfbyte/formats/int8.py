"""int8 rows: codes -127 to 127 with one absmax a row; their constants, and the weight layouts of old checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "CODE_MAX",
    "EXACT_FP32_TERMS",
    "EXACT_INT32_TERMS",
    "LAYOUTS",
    "STEP",
    "STEP_SQUARED",
    "WEIGHT_FORMATS",
    "Layout",
]

CODE_MAX = 127
"""Largest code; -128 is not used, so that the codes are symmetric."""

STEP = 1 / CODE_MAX
"""``value = code * absmax * STEP``."""

STEP_SQUARED = 1 / CODE_MAX**2
"""``product = sum of code products * (absmax of the column * STEP_SQUARED) * absmax of the row``: 6.2000124e-05."""

EXACT_FP32_TERMS = 1024
"""Products of two int8 numbers whose sum fp32 holds exactly, whatever their order: 1024 * 128**2 = 2**24."""

EXACT_INT32_TERMS = 131072
"""Products of two int8 numbers whose sum int32 holds: 131072 * 127**2 < 2**31."""

WEIGHT_FORMATS = ("row", "col32", "col_turing", "col_ampere")
"""Names of the layouts a checkpoint's ``weight_format`` numbers (0 to 3). Only ``row`` is written."""


@dataclass(frozen=True)
class Layout:
    """How a padded weight lies in memory: a chain of digits that index it, and how they make up row and column.

    Attributes:
        rows: Digits of a row within its tile, largest first, as positions in ``memory``.
        columns: Digits of a column within its tile of 32, likewise.
        memory: Sizes of the digits within a tile, in memory order. Tiles follow each other down the rows, then along
            the columns.
        row_tile: Rows of a tile; the stored weight is padded to a multiple.
    """

    row_tile: int
    memory: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


LAYOUTS = {
    # CUBLASLT_ORDER_COL32: tiles of 32 columns, row after row.
    "col32": Layout(1, (32,), (), (0,)),
    # CUBLASLT_ORDER_COL4_4R2_8C: tiles of 8 rows; the even rows first, then the odd; in each half, 8 groups of 4
    # columns; in each group, 4 rows of 4.
    "col_turing": Layout(8, (2, 8, 4, 4), (2, 0), (1, 3)),
    # CUBLASLT_ORDER_COL32_2R_4R4: tiles of 32 rows; the row at ((row % 8) / 2 * 4 + row / 8) * 2 + row % 2.
    "col_ampere": Layout(32, (4, 4, 2, 32), (1, 0, 2), (3,)),
}
"""Layouts of cuBLASLt (cublasLtOrder_t in its reference) that bitsandbytes up to 0.44 wrote; 32 columns a tile."""
