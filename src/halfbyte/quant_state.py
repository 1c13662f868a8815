"""QuantState: what is needed to read a packed tensor back, and its serialized form (bitsandbytes' on-disk contract)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.formats import blocks
from halfbyte.formats.codebook import codebook, codebook_names

__all__ = ["PACKED_PREFIX", "QuantState", "changes", "pack_dict_to_tensor", "unpack_tensor_to_dict"]

PACKED_PREFIX = "bitsandbytes__"
"""The JSON blob of a weight is stored under ``<weight>.quant_state.bitsandbytes__<quant_type>``."""


def pack_dict_to_tensor(source_dict: Mapping[str, Any]) -> Tensor:
    """UTF-8 JSON of ``source_dict`` as a 1-D uint8 tensor.

    >>> pack_dict_to_tensor({"a": 1}).tolist() == list(b'{"a": 1}')
    True
    """
    return torch.tensor(list(json.dumps(source_dict).encode("utf-8")), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """The dictionary whose JSON bytes a uint8 tensor holds.

    Raises:
        CheckpointError: The bytes are no JSON object.
    """
    try:
        found = json.loads(bytes(tensor_data.to(device="cpu", dtype=torch.uint8).flatten().tolist()).decode("utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(
            f"the quant_state blob is no valid JSON ({error})",
            expected=f"the bytes of a JSON object under a key ending in {PACKED_PREFIX}nf4 or {PACKED_PREFIX}fp4",
            hint="the checkpoint is damaged: download or save it again",
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"the quant_state blob holds a JSON {type(found).__name__}", expected="a JSON object")
    return found


_changes = [0]


def changes() -> int:
    """How often an attribute of any QuantState was set: as long as it stays the same, all states are what they were."""
    return _changes[0]


class QuantState:
    """Scales, codebook and original shape of a quantized tensor. Attributes may be assigned.

    Attributes:
        absmax: fp32 ``(blocks,)``; under double quantization uint8 codes of the same shape.
        shape: Shape of the original tensor.
        code: fp32 levels, 16 entries (4-bit) or 256.
        dtype: dtype of the original tensor, to which it dequantizes.
        blocksize: Values per block.
        quant_type: ``"nf4"``, ``"fp4"``, ...; None for 8-bit blockwise.
        offset: fp32 0-dim mean that was taken off absmax before it was quantized, else None.
        state2: The QuantState of absmax under double quantization, else None.
        nested: Whether absmax is double-quantized.
    """

    valid_quant_types = ("fp4", "nf4")
    valid_qs_type_keys = tuple(f"{PACKED_PREFIX}{name}" for name in valid_quant_types)
    valid_qs_keys: ClassVar[list[str]] = [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state",
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | tuple[int, ...] | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        _changes[0] += 1

    def __getattr__(self, name: str) -> Any:
        # FSDP asks for the packed blob by its key, as an attribute.
        if name.startswith(PACKED_PREFIX):
            if self.quant_type is None or name != PACKED_PREFIX + self.quant_type:
                raise AttributeError(f"{name} on a QuantState of quant_type {self.quant_type!r}")
            return self.as_dict(packed=True)[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, index: int | slice) -> Any:
        """The list that old code indexes: absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        return (
            self.shape == other.shape
            and self.quant_type == other.quant_type
            and self.dtype == other.dtype
            and self.blocksize == other.blocksize
            and _close(self.absmax, other.absmax)
            and _close(self.code, other.code)
            and _close(self.offset, other.offset)
            and self.state2 == other.state2
        )

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        shape = tuple(self.shape) if self.shape is not None else None
        return (
            f"QuantState(quant_type={self.quant_type!r}, shape={shape}, dtype={self.dtype}, "
            f"blocksize={self.blocksize}, nested={self.nested}, device={self.absmax.device})"
        )

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds."""
        own = [tensor for tensor in (self.absmax, self.code, self.offset) if tensor is not None]
        return own + (self.state2.tensors() if self.state2 is not None else [])

    def to(self, device: torch.device | str | int) -> QuantState:
        """Move every tensor to ``device``, in place. Returns itself."""
        self.absmax = self.absmax.to(device)
        self.code = self.code.to(device) if self.code is not None else None
        self.offset = self.offset.to(device) if self.offset is not None else None
        if self.state2 is not None:
            self.state2.to(device)
        return self

    def copy_to(self, device: torch.device | str | int) -> QuantState:
        """A QuantState of its own with every tensor on ``device`` (shared where it is there already)."""
        twin = QuantState(self.absmax, self.shape, self.code, self.blocksize, self.quant_type, self.dtype, self.offset)
        if self.state2 is not None:
            twin.state2 = self.state2.copy_to(device)
            twin.nested = self.nested
        return twin.to(device)

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The serialized form.

        Args:
            packed: Only tensors, as state dicts and safetensors need: the rest goes into one JSON blob tensor.
        """
        found: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": tuple(self.shape) if self.shape is not None else None,
        }
        if self.state2 is not None:
            offset = 0.0 if self.offset is None else self.offset.item()
            found |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                # A tensor that two weights share could not be saved.
                "nested_quant_map": self.state2.code.clone() if self.state2.code is not None else None,
                "nested_dtype": str(self.state2.dtype).removeprefix("torch."),
                "nested_offset": offset,
            }
        if not packed or not self.quant_type:
            return found
        tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
        plain = {key: value for key, value in found.items() if not isinstance(value, Tensor)}
        return {**tensors, f"quant_state.{PACKED_PREFIX}{self.quant_type}": pack_dict_to_tensor(plain)}

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str | int | None) -> QuantState:
        """Read either form that :meth:`as_dict` writes. ``qs_dict`` is left as it is.

        Args:
            qs_dict: Keys may carry prefixes ending in a dot (``model.layers.0.mlp.up_proj.weight.absmax``).
            device: Where the tensors go.

        Raises:
            CheckpointError: Keys are missing, foreign or double, the JSON is damaged, or lengths do not fit the shape.
        """
        items = _strip(qs_dict)
        absmax, code = _tensor(items, "absmax", device), _tensor(items, "quant_map", device)
        shape = items.get("shape")
        dtype = _dtype(items.get("dtype"), "dtype")
        blocksize = _positive(items, "blocksize")
        if "nested_absmax" not in items:
            if not absmax.is_floating_point():
                raise CheckpointError(
                    f"absmax is {absmax.dtype} and there is no nested_absmax",
                    expected="float32, or both levels of a double quantization",
                    hint="the checkpoint is truncated: download or save it again",
                )
            return _checked(cls(absmax.float(), _size(shape), code.float(), blocksize, items["quant_type"], dtype))
        offset = items.get("nested_offset", 0.0)
        if isinstance(offset, bool) or not isinstance(offset, (int, float, Tensor)):
            raise CheckpointError(f"nested_offset is {offset!r}", expected="a number")
        state2 = cls(
            _tensor(items, "nested_absmax", device).float(),
            None,
            _tensor(items, "nested_quant_map", device).float(),
            _positive(items, "nested_blocksize"),
            None,
            _dtype(items.get("nested_dtype"), "nested_dtype"),
        )
        # Loaders cast what they do not know: an offset in bf16 would shift every weight, so fp32 always.
        mean = torch.as_tensor(offset, dtype=torch.float32).reshape(()).to(device or absmax.device)
        return _checked(cls(absmax, _size(shape), code.float(), blocksize, items["quant_type"], dtype, mean, state2))


def _close(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.shape == right.shape and torch.allclose(left.float(), right.float().to(left.device), atol=1e-6)


def _strip(qs_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Bare keys, the JSON blob unpacked among them."""
    packed = {key: value for key, value in qs_dict.items() if PACKED_PREFIX in key and isinstance(value, Tensor)}
    if not packed and "quant_type" not in {key.rsplit(".", 1)[-1] for key in qs_dict}:
        raise CheckpointError(
            "neither a packed nor an unpacked quant_state among " + (", ".join(sorted(qs_dict)) or "no keys"),
            expected=f"a key ending in quant_state.{PACKED_PREFIX}nf4 or {PACKED_PREFIX}fp4",
            hint="the checkpoint was not saved from a 4-bit model, or lost keys on its way",
        )
    if len(packed) > 1:
        raise CheckpointError(f"{len(packed)} packed quant_state items: {', '.join(sorted(packed))}", expected="one")
    items = {key.rsplit(".", 1)[-1]: value for key, value in qs_dict.items() if key not in packed}
    if packed:
        key, blob = next(iter(packed.items()))
        items |= unpack_tensor_to_dict(blob)
        named = key.rsplit(PACKED_PREFIX, 1)[-1]
        if items.get("quant_type", named) != named:
            raise CheckpointError(f"key {key} holds quant_type {items['quant_type']!r}", expected=named)
    foreign = sorted(set(items) - set(QuantState.valid_qs_keys))
    if foreign:
        raise CheckpointError(
            f"foreign keys in the quant_state: {', '.join(foreign)}", expected=", ".join(QuantState.valid_qs_keys)
        )
    missing = [key for key in ("absmax", "quant_map", "quant_type", "blocksize", "dtype") if items.get(key) is None]
    if missing:
        raise CheckpointError(
            f"the quant_state lacks {', '.join(missing)}",
            hint="the checkpoint is truncated: download or save it again",
        )
    if items["quant_type"] not in codebook_names(4):
        raise CheckpointError(f"quant_type is {items['quant_type']!r}", expected="nf4 or fp4")
    return items


def _tensor(items: dict[str, Any], key: str, device: torch.device | str | int | None) -> Tensor:
    value = items.get(key)
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"{key} is {type(value).__name__}",
            expected="a tensor",
            hint="the checkpoint is truncated: download or save it again",
        )
    return value.to(device) if device is not None else value


def _positive(items: dict[str, Any], key: str) -> int:
    value = items.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{key} is {value!r}", expected="a positive whole number")
    return value


def _dtype(name: object, key: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{key} is {name!r}", expected="the name of a torch dtype, such as 'bfloat16'")
    return found


def _size(shape: object) -> torch.Size | None:
    if shape is None:
        return None
    if not isinstance(shape, (list, tuple)) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise CheckpointError(f"shape is {shape!r}", expected="a list of whole numbers")
    return torch.Size(shape)


def _checked(state: QuantState) -> QuantState:
    """``state`` itself, once its lengths fit its shape."""
    if state.code is None or state.blocksize is None or state.shape is None:
        return state
    assert state.quant_type is not None
    if state.blocksize not in blocks.BLOCKSIZES_4BIT:
        known = ", ".join(map(str, blocks.BLOCKSIZES_4BIT))
        raise CheckpointError(f"blocksize is {state.blocksize}", expected=f"one of {known}")
    levels = 1 << codebook(state.quant_type).bits
    if state.code.numel() != levels:
        raise CheckpointError(f"quant_map has {state.code.numel()} values", expected=f"{levels}")
    count = blocks.block_count(math.prod(state.shape), state.blocksize)
    _expect(state.absmax, "absmax", count, torch.uint8 if state.state2 is not None else torch.float32)
    if state.state2 is not None:
        assert state.state2.code is not None
        assert state.state2.blocksize is not None
        _expect(state.state2.code, "nested_quant_map", 256, torch.float32)
        second = blocks.block_count(count, state.state2.blocksize)
        _expect(state.state2.absmax, "nested_absmax", second, torch.float32)
    return state


def _expect(tensor: Tensor, what: str, numel: int, dtype: torch.dtype) -> None:
    if tensor.numel() != numel or tensor.dtype != dtype:
        raise CheckpointError(
            f"{what} is {tensor.dtype} with {tensor.numel()} values",
            expected=f"{dtype} with {numel}",
            hint="the checkpoint is truncated or mixed from two: download or save it again",
        )
