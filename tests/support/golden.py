"""The golden files that bitsandbytes 0.50.2 wrote (tests/golden/make.py), read once."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

__all__ = ["DTYPES", "STORAGES", "golden", "manifest", "nibbles"]

FOLDER = Path(__file__).parent.parent / "golden"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORAGES = {"uint8": torch.uint8, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@cache
def golden(name: str) -> dict[str, torch.Tensor]:
    """Tensors of one file."""
    return load_file(FOLDER / f"{name}.safetensors")


@cache
def manifest() -> dict[str, Any]:
    """What is no tensor: key orders and scalars."""
    return json.loads((FOLDER / "manifest.json").read_text())


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """4-bit codes in element order, high half of each byte first."""
    stream = packed.reshape(-1).view(torch.uint8)
    return torch.stack([stream >> 4, stream & 15], dim=1).flatten()
