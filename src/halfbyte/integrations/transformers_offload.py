"""Quantized weights on the disk: transformers stores them as codes, and the layers in memory keep the scales."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import core_model_loading

from halfbyte.nn import Int8Params, Linear8bitLt, Params4bit

__all__ = ["forget_owners", "mark_owners", "store_codes"]


def _int8_layers(model: torch.nn.Module) -> Iterator[Linear8bitLt]:
    return (module for module in model.modules() if isinstance(module, Linear8bitLt))


def mark_owners(model: torch.nn.Module) -> None:
    """Let 8-bit weights know their layers, as 4-bit ones do, while a model is loaded."""
    for layer in _int8_layers(model):
        vars(layer.weight)["module"] = layer


def forget_owners(model: torch.nn.Module) -> None:
    """Undo :func:`mark_owners`."""
    for layer in _int8_layers(model):
        vars(layer.weight).pop("module", None)


def _holds_codes(param: Any) -> bool:
    four_bit = isinstance(param, Params4bit) and param.bnb_quantized
    return four_bit or (isinstance(param, Int8Params) and param.dtype == torch.int8)


def store_codes() -> None:
    """Make transformers write a quantized weight to its offload folder; it would read the dense one at every use."""
    plain = core_model_loading.offload_and_maybe_resave_param
    if getattr(plain, "__module__", "") == __name__:
        return

    def offload_and_maybe_resave_param(
        target_name: str, param: Any, loading_info: Any, folder: Any, index: Any, applied: Any
    ) -> Any:
        owner: Any = getattr(param, "module", None)
        if owner is None or not _holds_codes(param):
            return plain(target_name, param, loading_info, folder, index, applied)
        owner.weight = param.to("meta")
        owner.weight._is_hf_initialized = True
        if hasattr(param, "quant_state"):
            owner.weight.module, owner.quant_state = owner, param.quant_state
        loading_info.missing_keys.discard(target_name)
        return core_model_loading.offload_weight(param.data, target_name, folder, index)

    core_model_loading.offload_and_maybe_resave_param = offload_and_maybe_resave_param
