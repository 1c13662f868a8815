"""What merged weights are stored in, and the files they are written to, a bounded part at a time."""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import halfbyte.functional as F
from halfbyte.checkpoint import write
from halfbyte.checkpoint.reader import FILE_NAME, INDEX_NAME
from halfbyte.errors import ArgumentError
from halfbyte.quant_state import QuantState

__all__ = ["FORMATS", "Format", "ShardWriter", "give_back"]

FORMATS = ("4bit", "8bit", "bf16")


@dataclass(frozen=True)
class Format:
    """How quantizable weights are stored.

    Attributes:
        to: One of FORMATS.
        quant_type: Of 4-bit weights.
        double_quant: Of 4-bit weights.
        storage: dtype under which packed bytes appear.
    """

    to: str
    quant_type: str = "nf4"
    double_quant: bool = True
    storage: torch.dtype = torch.uint8

    @classmethod
    def of(cls, quantization: dict[str, Any], to: str | None, quant_type: str | None, double: bool | None) -> Format:
        """From a checkpoint's quantization_config, with what was asked for in the place of what it says.

        Raises:
            ArgumentError: A name that is none of FORMATS.

        >>> Format.of({}, "4bit", None, None).label, Format.of({"load_in_8bit": True}, None, None, None).label
        ('nf4, double quant', 'int8')
        """
        four_bit = bool(quantization.get("load_in_4bit"))
        if to is None:
            to = "bf16" if not quantization else "4bit" if four_bit else "8bit"
        if to not in FORMATS:
            raise ArgumentError(f"format {to!r}", expected=" or ".join(FORMATS))
        if not four_bit:
            quantization = {}
        return cls(
            to,
            quant_type or quantization.get("bnb_4bit_quant_type", "nf4"),
            quantization.get("bnb_4bit_use_double_quant", True) if double is None else double,
            getattr(torch, quantization.get("bnb_4bit_quant_storage", "uint8")),
        )

    @property
    def label(self) -> str:
        """For people."""
        if self.to != "4bit":
            return {"8bit": "int8", "bf16": "bf16"}[self.to]
        return self.quant_type + (", double quant" if self.double_quant else "")

    def encode(self, name: str, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that a checkpoint has for a weight of shape (out, in).

        Args:
            name: Its key, which ends in ``.weight`` where it is stored in 8 bits.
            weight: Its values.
            dtype: What it dequantizes to.
        """
        if self.to == "bf16":
            return {name: weight.to(torch.bfloat16)}
        if self.to == "8bit":
            codes, scales, _ = F.int8_vectorwise_quant(weight)
            owner = name.removesuffix("weight")
            return {name: codes, f"{owner}SCB": scales, f"{owner}weight_format": torch.tensor(0, dtype=torch.uint8)}
        codes, state = F.quantize_4bit(
            weight, quant_type=self.quant_type, compress_statistics=self.double_quant, quant_storage=self.storage
        )
        state.dtype = dtype
        return {name: codes, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}

    def decode(self, name: str, stored: dict[str, Tensor]) -> Tensor:
        """The fp32 values that :meth:`encode` stored."""
        codes = stored[name]
        if self.to == "bf16":
            return codes.float()
        if self.to == "8bit":
            return F.int8_vectorwise_dequant(codes, stored[f"{name.removesuffix('weight')}SCB"])
        state = QuantState.from_dict({key: value for key, value in stored.items() if key != name}, None)
        state.dtype = torch.float32
        return F.dequantize_4bit(codes, state)

    def config(self, old: dict[str, Any], dtype: torch.dtype) -> dict[str, Any] | None:
        """The quantization_config of the result; None for a dense one.

        Args:
            old: That of the base.
            dtype: In which its layers compute, where the base does not say.
        """
        if self.to == "bf16":
            return None
        four_bit = self.to == "4bit"
        named = str(dtype).removeprefix("torch.")
        fresh: dict[str, Any] = {
            "_load_in_4bit": four_bit,
            "_load_in_8bit": not four_bit,
            "bnb_4bit_compute_dtype": old.get("bnb_4bit_compute_dtype", named) if four_bit else "float32",
            "bnb_4bit_quant_storage": str(self.storage).removeprefix("torch."),
            "bnb_4bit_quant_type": self.quant_type if four_bit else "fp4",
            "bnb_4bit_use_double_quant": self.double_quant if four_bit else False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": None,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": four_bit,
            "load_in_8bit": not four_bit,
            "quant_method": "bitsandbytes",
        }
        return fresh | {key: value for key, value in old.items() if key.startswith("llm_int8_") or key not in fresh}


@cache
def _trim() -> Any:
    """glibc's malloc_trim; None elsewhere."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Return freed memory to the system: glibc keeps that of large tensors, in pieces that fit none of the next."""
    trim = _trim()
    if trim is not None:
        trim(0)


class ShardWriter:
    """Writes tensors to files of at most ``limit`` bytes as they come; names and index at the end.

    Args:
        folder: Where they go.
        limit: Bytes held before they are written.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.nbytes = 0
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._files: list[list[str]] = []

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors that belong together into one file."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._held and self._held_bytes + size > self.limit:
            self._flush()
        self._held |= tensors
        self._held_bytes += size
        self.nbytes += size

    def _flush(self) -> None:
        write(self._held, self.folder / f"part-{len(self._files)}")
        self._files.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def finish(self) -> None:
        """Write what is left, and give the files the names that transformers looks for."""
        if self._held or not self._files:
            self._flush()
        count = len(self._files)
        if count == 1:
            (self.folder / "part-0").rename(self.folder / FILE_NAME)
            return
        names = [f"model-{index + 1:05}-of-{count:05}.safetensors" for index in range(count)]
        for index, name in enumerate(names):
            (self.folder / f"part-{index}").rename(self.folder / name)
        index = {
            "metadata": {"total_size": self.nbytes},
            "weight_map": {key: name for name, keys in zip(names, self._files, strict=True) for key in keys},
        }
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
