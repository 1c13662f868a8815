"""Experts in transformers' 4-bit quantizer: their stacked weights become codes when a model is loaded."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from halfbyte import _env
from halfbyte.nn.experts_4bit import Experts4bit, why_not_experts
from halfbyte.nn.left_alone import leave_alone

__all__ = ["convert_experts", "extend", "is_expert"]

COMPANIONS = (
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_map",
    ".absmax",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
    "",
)
"""What follows a 4-bit parameter's name in a checkpoint. Its own last: older transformers takes the first that fits."""


def is_expert(model: torch.nn.Module, name: str) -> bool:
    """Whether that parameter is a stack of experts in 4 bits."""
    module, own = get_module_from_name(model, name)
    return isinstance(module, Experts4bit) and own in module.four_bit_names


def convert_experts(model: torch.nn.Module, config: Any, skipped: list[str] | None) -> list[str]:
    """Turn every experts' layer of ``model`` that is not skipped into a 4-bit one, in place.

    Args:
        model: With weights or on the meta device.
        config: A BitsAndBytesConfig.
        skipped: transformers' patterns of names to leave alone.

    Returns:
        Names of the parameters that become codes.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if why_not_experts(module) is not None:
            continue
        own = [f"{name}.{p}" for p, value in module.named_parameters(recurse=False) if value.dim() == 3]
        if not all(should_convert_module(each, skipped) for each in (name, *own)):
            continue
        if not _env.get("HALFBYTE_QUANTIZE_EXPERTS"):
            leave_alone(module, "experts, which HALFBYTE_QUANTIZE_EXPERTS=0 leaves alone")
            continue
        layer = Experts4bit.take_over(
            module,
            compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
        )
        layer.requires_grad_(False)
        found += own
    return found


def extend(quantizer: Any) -> None:
    """Let transformers' 4-bit quantizer convert, load, save and dequantize experts."""
    before, after = quantizer._process_model_before_weight_loading, quantizer._process_model_after_weight_loading
    needs, dequantize = quantizer.param_needs_quantization, quantizer._dequantize

    def _process_model_before_weight_loading(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = before(self, model, *args, **kwargs)
        self.expert_names = convert_experts(model, self.quantization_config, self.modules_to_not_convert)
        return result

    def _process_model_after_weight_loading(self: Any, model: Any, **kwargs: Any) -> Any:
        _forget_merges(model, getattr(self, "expert_names", []))
        return after(self, model, **kwargs)

    def param_needs_quantization(self: Any, model: Any, param_name: str, **kwargs: Any) -> bool:
        return is_expert(model, param_name) or needs(self, model, param_name, **kwargs)

    def _dequantize(self: Any, model: Any, dtype: torch.dtype | None = None) -> Any:
        for module in model.modules():
            if isinstance(module, Experts4bit):
                module.give_back(dtype)
        return dequantize(self, model, dtype)

    quantizer._process_model_before_weight_loading = _process_model_before_weight_loading
    quantizer._process_model_after_weight_loading = _process_model_after_weight_loading
    quantizer.param_needs_quantization = param_needs_quantization
    quantizer._dequantize = _dequantize
    if hasattr(quantizer, "get_weight_conversions"):
        quantizer.get_weight_conversions = _with_experts(quantizer.get_weight_conversions)


def _with_experts(conversions: Any) -> Any:
    def get_weight_conversions(self: Any) -> list[Any]:
        from transformers.core_model_loading import WeightConverter

        from halfbyte.integrations.transformers_operations import DeserializeExperts

        found = list(conversions(self))
        if not self.pre_quantized:
            return found
        # The layer's name and the parameter's: the parameter's alone may be that of a linear layer elsewhere.
        for name in sorted({".".join(name.split(".")[-2:]) for name in getattr(self, "expert_names", [])}):
            sources = [name + companion for companion in COMPANIONS]
            found.append(WeightConverter(sources, name, [DeserializeExperts(self)]))
        return found

    return get_weight_conversions


def _forget_merges(model: Any, names: list[str]) -> None:
    """Drop conversions that merged experts: run backwards, when the model is saved, they would cut codes apart."""
    conversions = getattr(model, "_weight_conversions", None)
    if not conversions or not names:
        return

    def merges(conversion: Any) -> bool:
        if not getattr(conversion, "operations", None):
            return False
        targets = [target.replace(r"\1", ".*") for target in conversion.target_patterns]
        return any(re.search(f"{target}$", name) for target in targets for name in names)

    model._weight_conversions = [conversion for conversion in conversions if not merges(conversion)]
