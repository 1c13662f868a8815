"""Embedding tables in 16 or 32 bits whose optimizer states stay in 32 bits, under bitsandbytes' names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.optim.manager import GlobalOptimManager

__all__ = ["Embedding", "StableEmbedding"]


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding`` with Xavier initialisation; 8-bit optimizers of halfbyte keep its states in 32 bits.

    Args:
        num_embeddings: Rows.
        embedding_dim: Columns.
        padding_idx: Row that starts as zeros and gets no gradient.
        max_norm: Rows that are looked up are rescaled to at most this norm.
        norm_type: Which norm.
        scale_grad_by_freq: Divide gradients by how often a row was looked up.
        sparse: Sparse gradients.
        _weight: The table, where it exists already.
        device: Where the table is created.

    >>> Embedding(10, 4)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 4])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
        )
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        """Xavier-uniform values; zeros in the row of ``padding_idx``."""
        torch.nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(Embedding):
    """:class:`Embedding` followed by a layer norm in full precision; returns the dtype of its table.

    Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861, section 2.3.

    >>> rows = StableEmbedding(10, 64)(torch.tensor([3]))
    >>> bool(rows.mean().abs() < 1e-5), bool((rows.std(unbiased=False) - 1).abs() < 0.1)
    (True, True)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if _weight is None and dtype is not None:
            _weight = torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
            torch.nn.init.xavier_uniform_(_weight)
            if padding_idx is not None:
                _weight[padding_idx].zero_()
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device,
        )
        self.norm = torch.nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Normalised rows."""
        rows = F.embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
        return self.norm(rows.to(self.norm.weight.dtype)).to(self.weight.dtype)
