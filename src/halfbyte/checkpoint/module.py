"""Saving and loading whole modules with quantized layers, all or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.checkpoint.keys import weight_of
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.writer import write
from halfbyte.errors import CheckpointError
from halfbyte.nn.experts_4bit import Experts4bit
from halfbyte.nn.holds_4bit import Holds4bit
from halfbyte.nn.holds_8bit import Holds8bit
from halfbyte.quant_state import QuantState

__all__ = ["load", "save"]

_INT8_KEYS = ("SCB", "weight_format")


def save(module: torch.nn.Module, path: str | Path) -> None:
    """Write the state dict of ``module`` to one safetensors file, which bitsandbytes reads too.

    Raises:
        CheckpointError: Something that is no tensor, or a disk that is full. The file stays as it was.
    """
    state = module.state_dict()
    others = [f"{key} is {type(value).__name__}" for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(others[0], expected="tensors: safetensors holds nothing else")
    write(state, path)


def load(module: torch.nn.Module, path: str | Path, *, strict: bool = True) -> None:
    """Load a checkpoint into ``module``; everything is checked before anything changes.

    Args:
        module: Any module. Its 4-bit layers may be quantized, fresh or on the meta device, which is left for the
            checkpoint's own.
        path: A safetensors file, or a folder that :class:`Checkpoint` can read.
        strict: Whether keys may neither be missing nor left over.

    Raises:
        CheckpointError: A damaged file, or one of another model. The module stays as it was.
    """
    checkpoint = Checkpoint(path)
    states = {weight: checkpoint.quant_state(weight) for weight in checkpoint.four_bit}
    _check_keys(module, checkpoint, states, strict)
    _check_shapes(module, checkpoint, states)
    _check_int8(module, checkpoint)
    on_meta = any(tensor.device.type == "meta" for tensor in module.state_dict().values())
    module.load_state_dict(dict(checkpoint), strict=strict, assign=on_meta)


def _check_keys(
    module: torch.nn.Module, checkpoint: Checkpoint, states: Mapping[str, QuantState], strict: bool
) -> None:
    layers = _layers(module)
    for weight in states:
        if weight not in layers and (strict or weight in module.state_dict()):
            raise CheckpointError(
                f"{checkpoint.path}: {weight} is a 4-bit weight, and the module has no 4-bit layer of that name",
                expected="the layers that were saved",
            )
    if not strict:
        return
    described = {key for weight, keys in checkpoint.four_bit.items() if weight in states for key in keys}
    extra = {f"{name}.{key}".lstrip(".") for name in _int8_layers(module) for key in _INT8_KEYS}
    own = {key for key in module.state_dict() if weight_of(key) not in layers and key not in extra}
    # A layer has its extra keys once it is quantized only; which of them belong together is checked by itself.
    own |= extra & set(checkpoint)
    for what, keys in (("lacks", own - set(checkpoint)), ("holds foreign", set(checkpoint) - own - described)):
        if keys:
            shown = sorted(keys)
            more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
            raise CheckpointError(
                f"{checkpoint.path} {what} {', '.join(shown[:3])}{more}",
                expected="the keys of the module",
                hint="pass strict=False to load what there is",
            )


def _check_shapes(module: torch.nn.Module, checkpoint: Checkpoint, states: Mapping[str, QuantState]) -> None:
    layers = _layers(module)
    for name, own in module.state_dict().items():
        if name not in checkpoint or weight_of(name) in layers:
            continue
        shape, saved = tuple(own.shape), checkpoint.shape(name)
        if name in layers:
            shape = layers[name]
        if name in states:
            saved = tuple(states[name].shape or ())
        if saved != shape:
            raise CheckpointError(f"{checkpoint.path}: {name} has shape {saved}", expected=f"{shape}, as in the module")
        if name in layers and name not in states and not bool(checkpoint[name].isfinite().all()):
            raise CheckpointError(f"{checkpoint.path}: {name} holds NaN or inf", expected="finite values")


def _check_int8(module: torch.nn.Module, checkpoint: Checkpoint) -> None:
    for name, layer in _int8_layers(module).items():
        weight, scales = (f"{name}.{key}".lstrip(".") for key in ("weight", "SCB"))
        is_int8 = weight in checkpoint and checkpoint.dtype(weight) == "I8"
        if is_int8 != (scales in checkpoint):
            raise CheckpointError(
                f"{checkpoint.path}: one of {weight} in int8 and {scales} without the other", expected="both or neither"
            )
        if is_int8 and math.prod(checkpoint.shape(scales)) != layer.weight_shape()[0]:
            raise CheckpointError(
                f"{checkpoint.path}: {scales} has shape {checkpoint.shape(scales)}",
                expected=f"({layer.weight_shape()[0]},)",
            )


def _int8_layers(module: torch.nn.Module) -> dict[str, Holds8bit]:
    named = module.named_modules(remove_duplicate=False)
    return {name: layer for name, layer in named if isinstance(layer, Holds8bit)}


def _layers(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of 4-bit layers, by their keys."""
    found: dict[str, tuple[int, ...]] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, Holds4bit):
            found[f"{name}.weight".lstrip(".")] = layer.weight_shape()
        if isinstance(layer, Experts4bit):
            found |= {f"{name}.{own}".lstrip("."): layer.shape_of(own) for own in layer.four_bit_names}
    return found
