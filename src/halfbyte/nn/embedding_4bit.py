"""Embedding tables in 4 bits: a look-up decodes the rows it returns, and no others."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import backends as _backends  # defines and binds the ops
from halfbyte.functional import format_of, kernel_scales
from halfbyte.nn.embedding_kinds import QuantizedTable, take_over
from halfbyte.nn.holds_4bit import Holds4bit
from halfbyte.nn.linear_4bit import fix_4bit_weight_quant_state_from_module
from halfbyte.nn.params import Params4bit
from halfbyte.quant_state import QuantState

__all__ = ["Embedding4bit", "EmbeddingFP4", "EmbeddingNF4"]

_ops = torch.ops.halfbyte
del _backends


class Embedding4bit(QuantizedTable, Holds4bit, torch.nn.Embedding):
    """``torch.nn.Embedding`` with a frozen table that becomes 4-bit codes on its first move to a device.

    Rows of any length work; those that are no multiple of the block size (64) share blocks with their neighbours, and
    are looked up a little slower.

    Args:
        num_embeddings: Rows.
        embedding_dim: Columns.
        dtype: Of the table and of what a look-up returns; None is torch's default.
        quant_type: ``"nf4"`` or ``"fp4"``.
        quant_storage: dtype under which the packed bytes appear.
        device: Where the unquantized table is created.

    >>> table = Embedding4bit(1000, 64, quant_type="nf4").to("cpu")
    >>> table.weight.shape, table(torch.tensor([[7, 999]])).shape
    (torch.Size([32000, 1]), torch.Size([1, 2, 64]))
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self._hold(self.weight.data, quant_type, False, quant_storage)

    @classmethod
    def from_embedding(
        cls,
        embedding: torch.nn.Embedding,
        quant_type: str = "nf4",
        compress_statistics: bool = False,
        quant_storage: torch.dtype = torch.uint8,
    ) -> Embedding4bit:
        """A 4-bit layer around the table of another one, unquantized until it is moved.

        Args:
            embedding: Keeps its table. Subclasses that add to ``torch.nn.Embedding``'s forward pass keep doing so.
            quant_type: ``"nf4"`` or ``"fp4"``.
            compress_statistics: Double quantization of the scales.
            quant_storage: dtype under which the packed bytes appear.

        Raises:
            UnsupportedError: A layer that reads its table itself, or changes it (``max_norm``).
        """
        table = embedding.weight.data
        return take_over(cls, embedding, lambda made: made._hold(table, quant_type, compress_statistics, quant_storage))

    def _hold(self, table: Tensor, quant_type: str, compress_statistics: bool, quant_storage: torch.dtype) -> None:
        self.dtype = table.dtype
        self.weight = Params4bit(
            table,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """The rows ``input`` names, in the layer's dtype."""
        state = getattr(self.weight, "quant_state", None)
        if state is None:
            if self.quant_state is None or not torch.compiler.is_compiling():
                fix_4bit_weight_quant_state_from_module(self)
            state = self.quant_state
        assert state is not None
        shape, blocksize, kind, _ = format_of(state)
        scales = kernel_scales(state)
        return _ops.embedding_4bit(input, self.weight, shape, scales[0], blocksize, kind, self.dtype, *scales[1:])


class EmbeddingFP4(Embedding4bit):
    """:class:`Embedding4bit` with FP4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """:class:`Embedding4bit` with NF4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)
