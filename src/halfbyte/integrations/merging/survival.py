"""How much of an adapter's change is left after the merged weight was rounded to its format."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from torch import Tensor

__all__ = ["LOST_BELOW", "PART", "LayerSurvival", "Survival", "measure"]

LOST_BELOW = 0.5
"""Kept share of a change below which its layer counts as lost."""

PART = 2**20
"""Values that are compared at a time, in float64."""


@dataclass(frozen=True)
class LayerSurvival:
    """One weight.

    Attributes:
        name: Its key.
        change: Norm of the adapter's change over the norm of the weight.
        kept: Share of the change that the stored weight has: the stored difference, projected on the change. 1 is all
            of it, 0 is none.
        cosine: Between the stored difference and the change: what rounding adds at random makes it small.
    """

    name: str
    change: float
    kept: float
    cosine: float

    @property
    def lost(self) -> bool:
        """Whether less than half of the change arrived."""
        return self.kept < LOST_BELOW


@dataclass(frozen=True)
class Survival:
    """What :func:`~halfbyte.integrations.merging.merge` did.

    Attributes:
        layers: Every weight that the adapter changes.
        replaced: Weights that were trained whole and taken from the adapter as they are.
        format: What the merged weights are stored in.
        nbytes: Size of the written tensors.
    """

    layers: tuple[LayerSurvival, ...]
    replaced: tuple[str, ...]
    format: str
    nbytes: int

    @property
    def kept(self) -> float:
        """Mean of the layers' kept shares, each weighted with the square of its change."""
        weights = [layer.change**2 for layer in self.layers]
        total = sum(weights)
        return sum(w * layer.kept for w, layer in zip(weights, self.layers, strict=True)) / total if total else 1.0

    @property
    def lost(self) -> tuple[LayerSurvival, ...]:
        """Layers whose change did not arrive, worst first."""
        return tuple(sorted((layer for layer in self.layers if layer.lost), key=lambda layer: layer.kept))

    def summary(self) -> str:
        """One or two sentences; the second only where something was lost."""
        line = f"{len(self.layers)} weights merged into {self.format}; {self.kept:.0%} of the change is in the result"
        if not self.lost:
            return line
        shown = ", ".join(f"{layer.name} ({layer.kept:.0%})" for layer in self.lost[:5])
        more = f" and {len(self.lost) - 5} more" if len(self.lost) > 5 else ""
        return (
            f"{line}\nwarning: rounding to {self.format} undid most of the change in {len(self.lost)} of "
            f"{len(self.layers)} weights: {shown}{more}"
            "\nhint: merge into bf16 or 8 bits (--to bf16, --to 8bit), or keep the adapter beside the base model"
        )

    def json(self) -> str:
        """All of it as JSON."""
        return json.dumps({**asdict(self), "kept": self.kept, "lost": [layer.name for layer in self.lost]}, indent=1)


def measure(name: str, before: Tensor, after: Tensor, change: Tensor, weight: Tensor) -> LayerSurvival:
    """How much of ``change`` is in the difference of two stored weights.

    Args:
        name: Key of the weight.
        before: The weight as stored without the adapter, dequantized.
        after: As stored with it.
        change: What the adapter adds to the exact weight.
        weight: The exact weight, all of one shape.

    >>> import torch
    >>> change = torch.tensor([0.25, 0.25])
    >>> measure("w", torch.zeros(2), torch.tensor([0.25, 0.0]), change, torch.ones(2)).kept
    0.5
    """
    both = square = length = scale = 0.0
    parts = [tensor.reshape(-1).split(PART) for tensor in (before, after, change, weight)]
    for old, new, wanted, exact in zip(*parts, strict=True):
        stored, wanted = new.double() - old.double(), wanted.double()
        both += float(stored @ wanted)
        square += float(wanted @ wanted)
        length += float(stored @ stored)
        scale += float(exact.double().square().sum())
    size, length = math.sqrt(square), math.sqrt(length)
    return LayerSurvival(
        name,
        change=math.sqrt(square / scale) if scale else 0.0,
        kept=both / square if square else 1.0,
        cosine=both / (size * length) if size and length else float(size == length),
    )
