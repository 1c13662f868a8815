"""Embedding tables in int8 with a scale per row: a look-up decodes the rows it returns, and no others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.errors import QuantStateMissingError
from halfbyte.functional import int8_vectorwise_dequant
from halfbyte.nn.embedding_kinds import QuantizedTable, take_over
from halfbyte.nn.holds_8bit import Holds8bit
from halfbyte.nn.int8_params import Int8Params

__all__ = ["Embedding8bit"]


class Embedding8bit(QuantizedTable, Holds8bit, torch.nn.Embedding):
    """``torch.nn.Embedding`` with a frozen table that becomes int8 codes on its first move to a device.

    Args:
        num_embeddings: Rows.
        embedding_dim: Columns.
        device: Where the unquantized table is created.
        dtype: Of the table and of what a look-up returns; None is torch's default.

    >>> table = Embedding8bit(1000, 64).to("cpu")
    >>> table.weight.dtype, table.weight.SCB.shape, table(torch.tensor([[7, 999]])).shape
    (torch.int8, torch.Size([1000]), torch.Size([1, 2, 64]))
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self._hold(self.weight.data)

    @classmethod
    def from_embedding(cls, embedding: torch.nn.Embedding) -> Embedding8bit:
        """An int8 layer around the table of another one, unquantized until it is moved.

        Args:
            embedding: Keeps its table. Subclasses that add to ``torch.nn.Embedding``'s forward pass keep doing so.

        Raises:
            UnsupportedError: A layer that reads its table itself, or changes it (``max_norm``).
        """
        table = embedding.weight.data
        return take_over(cls, embedding, lambda made: made._hold(table))

    def _hold(self, table: Tensor) -> None:
        self.dtype = table.dtype
        self.weight = Int8Params(table, requires_grad=False, has_fp16_weights=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """The rows ``input`` names, in the layer's dtype.

        Raises:
            QuantStateMissingError: The table was never moved to a device, and is not quantized yet.
        """
        scales = getattr(self.weight, "SCB", None)
        if scales is None:
            raise QuantStateMissingError(
                "Embedding8bit was called before its table was quantized",
                expected="one move to a device, which quantizes",
                hint='call layer.to("cuda") or layer.to("cpu") first',
            )
        codes = F.embedding(input, self.weight.data)
        return int8_vectorwise_dequant(codes, scales[input].reshape(-1)).to(self.dtype)
