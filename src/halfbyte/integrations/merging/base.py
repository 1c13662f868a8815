"""The checkpoint that an adapter is merged into: dense, 4-bit or 8-bit, read a weight at a time."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import halfbyte.functional as F
from halfbyte.checkpoint import Checkpoint
from halfbyte.checkpoint.keys import weight_of
from halfbyte.errors import CheckpointError

__all__ = ["CONFIG_NAME", "Base"]

CONFIG_NAME = "config.json"


class Base:
    """A folder with ``config.json`` and safetensors files.

    Args:
        folder: As ``save_pretrained`` writes it.

    Attributes:
        config: The whole of config.json.
        quantization: Its quantization_config, empty for a dense checkpoint.
        bits: 4, 8 or None.

    Raises:
        CheckpointError: A folder that is none, or is quantized by another library.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(
                f"no folder {folder}",
                expected="the base model as a local folder",
                hint="download it first: hf download OWNER/NAME --local-dir DIR",
            )
        file = folder / CONFIG_NAME
        try:
            self.config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error})", expected="the folder of a transformers model"
            ) from None
        self.quantization: dict[str, Any] = self.config.get("quantization_config") or {}
        method = self.quantization.get("quant_method", "bitsandbytes")
        if method != "bitsandbytes":
            raise CheckpointError(
                f"{folder} is quantized by {method}",
                expected="a dense, 4-bit or 8-bit (bitsandbytes) checkpoint",
                hint="merge into the dense original",
            )
        self.checkpoint = Checkpoint(folder)

    @property
    def bits(self) -> int | None:
        """Of the quantized weights."""
        if not self.quantization:
            return None
        return 4 if self.quantization.get("load_in_4bit") else 8

    @cached_property
    def names(self) -> list[str]:
        """Keys of weights and other tensors, without those that describe another, in the order of the files."""
        return [name for name in self.checkpoint if weight_of(name) is None and not self._describes_int8(name)]

    def _describes_int8(self, name: str) -> bool:
        owner, _, last = name.rpartition(".")
        return last in {"SCB", "weight_format"} and f"{owner}.weight" in self.checkpoint

    def is_quantized(self, name: str) -> bool:
        """Whether the weight is stored as codes."""
        return name in self.checkpoint.four_bit or self.checkpoint.dtype(name) == "I8"

    def stored(self, name: str) -> dict[str, Tensor]:
        """A weight as it is stored, with everything that describes it."""
        keys = [name, *self.checkpoint.four_bit.get(name, ())]
        if self.checkpoint.dtype(name) == "I8":
            owner = name.rpartition(".")[0]
            keys += [key for key in (f"{owner}.SCB", f"{owner}.weight_format") if key in self.checkpoint]
        return {key: self.checkpoint[key] for key in keys}

    def value(self, name: str) -> Tensor:
        """The weight's values: dequantized, or as they are.

        Raises:
            CheckpointError: Codes whose scales are missing or damaged.
        """
        if name in self.checkpoint.four_bit:
            return F.dequantize_4bit(self.checkpoint[name], self.checkpoint.quant_state(name))
        stored = self.stored(name)
        weight = stored[name]
        if weight.dtype != torch.int8:
            return weight
        scales = stored.get(name.rpartition(".")[0] + ".SCB")
        if scales is None or scales.numel() != weight.shape[0]:
            raise CheckpointError(
                f"{self.checkpoint.path}: {name} is int8 without its scales",
                expected="SCB with a value per row",
                hint="the checkpoint is truncated: download or save it again",
            )
        return F.int8_vectorwise_dequant(weight, scales.float().view(-1))
