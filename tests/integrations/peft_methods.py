"""peft's methods: how each is set up on a small Llama, and what peft itself defines for it on quantized layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft

__all__ = ["METHODS", "OPERATIONS", "Method"]

OPERATIONS = ("forward", "backward", "merge", "unmerge", "merge_and_unload", "save and load")
"""What the table of docs/peft.md says of each method."""

TARGETS = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Method:
    """One method of peft.

    Attributes:
        config: Makes its configuration.
        size: Standard deviation of the random values put on its parameters, so that the adapter changes the
            logits by a twentieth or more.
        refusals: Operation -> class of the error that peft itself raises on quantized layers.
    """

    config: Callable[[], Any]
    size: float = 0.05
    refusals: dict[str, type[Exception]] = field(default_factory=dict)


_NOT_DEFINED: dict[str, type[Exception]] = {"merge": NotImplementedError, "unmerge": NotImplementedError}

METHODS: dict[str, Method] = {
    "LoRA": Method(lambda: peft.LoraConfig(r=8, target_modules=TARGETS)),
    "DoRA": Method(lambda: peft.LoraConfig(r=8, target_modules=TARGETS, use_dora=True)),
    "AdaLoRA": Method(
        lambda: peft.AdaLoraConfig(target_modules=TARGETS, total_step=10, tinit=1, tfinal=1),
        size=0.5,
        refusals={**_NOT_DEFINED, "merge_and_unload": NotImplementedError},
    ),
    "IA3": Method(
        lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        size=0.5,
        refusals={**_NOT_DEFINED, "merge_and_unload": ValueError},
    ),
    "OFT": Method(lambda: peft.OFTConfig(target_modules=TARGETS)),
    "BOFT": Method(lambda: peft.BOFTConfig(boft_block_size=8, target_modules=TARGETS), size=0.2),
    "VeRA": Method(lambda: peft.VeraConfig(r=8, target_modules=TARGETS), size=0.5),
    "RandLoRA": Method(lambda: peft.RandLoraConfig(r=8, target_modules=["q_proj", "up_proj"]), size=0.01),
    "PVeRA": Method(lambda: peft.PveraConfig(r=8, target_modules=TARGETS), size=0.5),
    "RoAd": Method(lambda: peft.RoadConfig(target_modules=TARGETS), size=0.5),
    "HiRA": Method(lambda: peft.HiraConfig(target_modules=TARGETS), size=0.18),
    "MiSS": Method(lambda: peft.MissConfig(r=8, target_modules=TARGETS)),
    "SHiRA": Method(lambda: peft.ShiraConfig(r=8, target_modules=TARGETS, random_seed=1)),
}
