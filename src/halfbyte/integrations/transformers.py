"""What halfbyte adds to transformers' bitsandbytes quantizers: the receipt line, re-saving, a safe ``dequantize``.

Importing this module changes the two quantizer classes in place; ``libraries.watch`` does it at the right time. In
place, since with the separate distribution the first import of bitsandbytes comes from a quantizer that exists already.
"""

from __future__ import annotations

import inspect
import logging
import sys
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from halfbyte import _env
from halfbyte.integrations import transformers_embeddings, transformers_experts
from halfbyte.integrations.post_import import after_import
from halfbyte.nn.compute_dtype import default_compute_dtype
from halfbyte.nn.linear_4bit import Linear4bit
from halfbyte.nn.receipt import WARN_BELOW, Receipt, count

__all__ = ["loading_line"]

logger = logging.getLogger("halfbyte")


def loading_line(found: Receipt, computes_in_fp32: bool, device: torch.device) -> tuple[int, str]:
    """Logging level and text for a model that was just loaded.

    Args:
        found: Its receipt.
        computes_in_fp32: Whether the layers were told to compute in fp32, which is also what transformers fills in.
        device: Where the layers are.
    """
    line = found.line()
    fast = default_compute_dtype(device)
    level = logging.INFO
    if found.weights and found.share < WARN_BELOW:
        level = logging.WARNING
        largest = found.skipped[0]
        line += f"; less than half is quantized, the largest part left alone is {largest.name} ({largest.reason})"
    if computes_in_fp32 and fast != torch.float32:
        level = logging.WARNING
        line += (
            f"; fp32 is slow on this {device.type} device, and is what transformers takes when nothing is given"
            f"\nhint: BitsAndBytesConfig(..., bnb_4bit_compute_dtype={fast})"
        )
    return level, line


def _tell(model: Any) -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
        return
    if _env.get("HALFBYTE_QUIET"):
        return
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    in_fp32 = any(layer.compute_dtype == torch.float32 for layer in layers)
    level, line = loading_line(count(model), in_fp32, layers[0].weight.device if layers else torch.device("cpu"))
    if logger.hasHandlers():
        logger.log(level, line)
    else:
        # Nobody set logging up: the line goes where transformers shows its progress bar.
        print(f"halfbyte: {line}", file=sys.stderr)


def _extend(quantizer: Any) -> None:
    """What both quantizers get."""
    after_loading, dequantize = quantizer._process_model_after_weight_loading, quantizer.dequantize
    before_loading, validate = quantizer._process_model_before_weight_loading, quantizer.validate_environment

    def _process_model_before_weight_loading(self: Any, model: Any, **kwargs: Any) -> Any:
        before_loading(self, model, **kwargs)
        places = kwargs.get("device_map")
        if isinstance(places, dict) and "disk" in places.values():
            from halfbyte.integrations import transformers_offload

            transformers_offload.store_codes()
            transformers_offload.mark_owners(model)

    def validate_environment(self: Any, *args: Any, **kwargs: Any) -> None:
        # Parts on the CPU or the disk are refused there unless they stay in 32 bits. Ours are quantized like any other.
        validate(self, *args, **{**kwargs, "device_map": None})

    def _process_model_after_weight_loading(self: Any, model: Any, **kwargs: Any) -> Any:
        if "damaged" in vars(self):
            self.damaged.raise_first()
        model = after_loading(self, model, **kwargs)
        if "halfbyte.integrations.transformers_offload" in sys.modules:
            sys.modules["halfbyte.integrations.transformers_offload"].forget_owners(model)
        _forget_load_operations(model)
        _tell(model)
        return model

    def dequantize_from_name(self: Any, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = model.config.dtype if dtype is None else dtype
        # Saving a model leaves its config with the dtype's name.
        named = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        return dequantize(self, model, named)

    quantizer.validate_environment = validate_environment
    quantizer._process_model_before_weight_loading = _process_model_before_weight_loading
    quantizer._process_model_after_weight_loading = _process_model_after_weight_loading
    if "dtype" in inspect.signature(dequantize).parameters:  # from transformers 5.0
        quantizer.dequantize = dequantize_from_name


def _extend_4bit(quantizer: Any) -> None:
    """Readable errors, and a ``_dequantize`` for models without 4-bit layers or with transposed ones."""
    dequantize = quantizer._dequantize

    def get_quantize_ops(self: Any) -> Any:
        from halfbyte.integrations.transformers_operations import Quantize4bit

        return Quantize4bit(self)

    def get_load_operations(self: Any) -> dict[str, Any]:
        del self
        from halfbyte.integrations.transformers_operations import Deserialize4bit

        return {"deserialize": Deserialize4bit}

    def _dequantize(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
        if not layers:
            logger.warning("dequantize: the model has no 4-bit layer and stays as it is")
            return model
        model = dequantize(self, model, *args, **kwargs)
        for name, layer in layers.items():
            if issubclass(getattr(layer, "source_cls", torch.nn.Linear), Conv1D):
                # Saved and loaded again, the weight must have the orientation that the model's class expects.
                model.set_submodule(name, _conv1d(model.get_submodule(name)))
        model.is_loaded_in_4bit = False
        return model

    if hasattr(quantizer, "get_quantize_ops"):
        quantizer.get_quantize_ops = get_quantize_ops
    if hasattr(quantizer, "get_load_operations"):
        quantizer.get_load_operations = get_load_operations
    elif hasattr(quantizer, "get_weight_conversions"):  # older transformers makes the operation itself
        quantizer.get_weight_conversions = _with_readable_errors(quantizer.get_weight_conversions)
    quantizer._dequantize = _dequantize


def _with_readable_errors(conversions: Any) -> Any:
    def get_weight_conversions(self: Any) -> list[Any]:
        from halfbyte.integrations.transformers_operations import Deserialize4bit

        found = list(conversions(self))
        for conversion in found:
            conversion.operations = [
                Deserialize4bit(self) if type(each).__name__ == "Bnb4bitDeserialize" else each
                for each in conversion.operations
            ]
        return found

    return get_weight_conversions


_LOADING = frozenset({"transformers.integrations.bitsandbytes", "halfbyte.integrations.transformers_operations"})
"""Modules whose operations read quantized weights."""


def _forget_load_operations(model: Any) -> None:
    # transformers would run them backwards when it saves, which they cannot; what the layers save is right as it is.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(type(operation).__module__ in _LOADING for operation in getattr(conversion, "operations", ()))
        ]


def _conv1d(linear: torch.nn.Linear) -> Conv1D:
    with torch.device("meta"):
        layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight = torch.nn.Parameter(linear.weight.data.t().contiguous())
    layer.bias = linear.bias
    return layer


transformers_experts.extend(Bnb4BitHfQuantizer)
transformers_embeddings.extend(Bnb4BitHfQuantizer)
transformers_embeddings.extend(Bnb8BitHfQuantizer)
after_import("transformers.modeling_utils", transformers_embeddings.extend_models)
_extend(Bnb4BitHfQuantizer)
_extend(Bnb8BitHfQuantizer)
_extend_4bit(Bnb4BitHfQuantizer)
