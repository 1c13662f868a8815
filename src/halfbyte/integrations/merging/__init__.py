"""Merging an adapter into a checkpoint, a layer at a time, with a report of what survives the rounding."""

from halfbyte.integrations.merging.merge import merge
from halfbyte.integrations.merging.survival import LayerSurvival, Survival, measure

__all__ = ["LayerSurvival", "Survival", "measure", "merge"]
