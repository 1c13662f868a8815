"""A packed 4-bit weight as the products' kernels take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from halfbyte.backends.cpu.kernels.level import CHUNK
from halfbyte.backends.cpu.scales import Scales
from halfbyte.backends.cpu.tables import Table

__all__ = ["Sizes", "Weight"]


class Sizes(NamedTuple):
    """What a product's plan depends on; ``blocksize`` values share a scale, ``nested`` scales are double-quantized."""

    rows: int
    columns: int
    blocksize: int
    nested: bool

    @property
    def chunks(self) -> int:
        """Of one row."""
        return self.columns // CHUNK


class Weight:
    """Codes, scales and levels of a weight ``(rows, columns)``, and the bias that goes with it.

    Args:
        packed: Any dtype.
        shape: Rows and columns.
        scales: Of the whole weight.
        blocksize: Values that share a scale.
        table: Lookup block of the codebook.
        bias: ``(rows,)`` in the activations' dtype.
    """

    __slots__ = ("bias", "blocksize", "columns", "packed", "rows", "scales", "table")

    def __init__(
        self,
        packed: Tensor,
        shape: Sequence[int],
        scales: Scales,
        blocksize: int,
        table: Table,
        bias: Tensor | None = None,
    ) -> None:
        self.rows, self.columns = shape
        self.packed = packed if packed.is_contiguous() else packed.detach().contiguous()
        self.bias = bias if bias is None or bias.is_contiguous() else bias.detach().contiguous()
        self.scales, self.blocksize, self.table = scales, blocksize, table

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.rows, self.columns, self.blocksize, self.scales.nested)

    @property
    def packed_address(self) -> int:
        return self.packed.data_ptr()

    @property
    def inputs(self) -> tuple[int, ...]:
        """Addresses of the bias, the levels and the scales, in the kernels' order."""
        bias = 0 if self.bias is None else self.bias.data_ptr()
        return bias, self.table.address, *self.scales.addresses
