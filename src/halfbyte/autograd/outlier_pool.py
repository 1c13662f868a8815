"""The pool of outlier columns that scripts of the first LLM.int8() releases kept for a whole model."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from halfbyte.errors import UnsupportedError

__all__ = ["GlobalOutlierPooler"]


class GlobalOutlierPooler:
    """Columns of the model's width in which any layer met an outlier; one pool a process, from :meth:`get_instance`.

    Products neither fill nor read it: each finds the outliers of its own rows.

    >>> pool = GlobalOutlierPooler.get_instance()
    >>> pool.initialize()
    >>> pool.add_outliers(torch.tensor([7, 3]), 64)
    >>> pool.add_outliers(torch.tensor([9]), 256)
    >>> pool.get_current_outlier_idx().tolist()
    [3, 7]
    """

    _instance: ClassVar[GlobalOutlierPooler | None] = None

    outliers: set[int]
    model_dim: int | None

    def __init__(self) -> None:
        raise UnsupportedError("there is one pool a process", hint="call GlobalOutlierPooler.get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalOutlierPooler:
        """The process's pool."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Empty the pool."""
        self.outliers = set()
        self.model_dim = None

    def add_outliers(self, outlier_idx: Tensor, feature_dim: int) -> None:
        """Add columns of a layer of that many features; the first call sets the width, other widths are ignored."""
        if self.model_dim is None:
            self.model_dim = feature_dim
        if feature_dim == self.model_dim:
            self.outliers.update(outlier_idx.tolist())

    def get_current_outlier_idx(self) -> Tensor:
        """The columns, int64, rising."""
        return torch.tensor(sorted(self.outliers), dtype=torch.int64)
