"""What stands between a parameter and its layer (``torch.nn.utils.parametrize``)."""

from __future__ import annotations

import torch
import torch.nn.utils.parametrize
from torch import Tensor

__all__ = ["double"]


class _Doubled(torch.nn.Module):
    def forward(self, original: Tensor) -> Tensor:
        """Twice the parameter."""
        return original * 2


def double(layer: torch.nn.Module, name: str) -> None:
    """Let the layer compute with twice its parameter of that name, worked out in each call."""
    torch.nn.utils.parametrize.register_parametrization(layer, name, _Doubled())
