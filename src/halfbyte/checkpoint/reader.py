"""Reading safetensors checkpoints, one file or many, tensor by tensor, and checking their 4-bit weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from halfbyte.checkpoint.keys import group_by_weight
from halfbyte.errors import ArgumentError, CheckpointError
from halfbyte.ops.arguments import check_packed, check_storage_dtype
from halfbyte.quant_state import QuantState

__all__ = ["FILE_NAME", "Checkpoint"]

FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read from its file when it is asked for.

    Args:
        path: A safetensors file; or a folder with ``model.safetensors``, or with the files that its
            ``model.safetensors.index.json`` names.

    Raises:
        CheckpointError: There is no such file, or it is cut short or no safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._handles: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        for file in _files_of(self.path):
            self._handles[file] = _open(file)
            self._files |= dict.fromkeys(self._handles[file].keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        return self._handles[self._files[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor as stored, without reading its values."""
        return tuple(self._handles[self._files[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as safetensors spells it (``"U8"``, ``"BF16"``), without reading its values."""
        return self._handles[self._files[name]].get_slice(name).get_dtype()

    @cached_property
    def four_bit(self) -> dict[str, list[str]]:
        """Names of the 4-bit weights, each with the keys that describe it."""
        return group_by_weight(self)

    def quant_state(self, weight: str) -> QuantState:
        """The state of a 4-bit weight, checked against its codes.

        Raises:
            CheckpointError: Something of it is missing, foreign, damaged or of another weight.
        """
        stats = self.four_bit[weight]
        try:
            state = QuantState.from_dict({key: self[key] for key in stats}, None)
            if weight not in self:
                raise CheckpointError(f"{stats[0]} without its codes", expected=f"{weight} beside it")
            codes = self[weight]
            check_storage_dtype(codes.dtype)
            if state.shape is not None:
                check_packed(codes, math.prod(state.shape))
        except (ArgumentError, CheckpointError) as error:
            raise CheckpointError(
                f"{self.path}: {weight}: {error.message}", expected=error.expected, hint=error.hint
            ) from None
        return state

    def check(self) -> None:
        """Check every 4-bit weight.

        Raises:
            CheckpointError: The first that is damaged, by its name.
        """
        for weight in self.four_bit:
            self.quant_state(weight)


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / FILE_NAME).is_file():
        return [path / FILE_NAME]
    index = path / INDEX_NAME
    if not index.is_file():
        raise CheckpointError(
            f"no checkpoint at {path}",
            expected=f"a safetensors file, or a folder with {FILE_NAME} or {INDEX_NAME}",
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index ({error!r})", expected="JSON with a weight_map") from None
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}",
            expected=f"every file that {INDEX_NAME} names",
            hint="download it again",
        )
    return [path / name for name in names]


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({error})",
            expected="a whole safetensors file",
            hint="it is cut short or of another format: download or save it again",
        ) from None
