"""What halfbyte adds to transformers' bitsandbytes quantizers: the receipt line, re-saving, a safe ``dequantize``.

Importing this module puts its quantizers into transformers' table; ``libraries.watch`` does it at the right time.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from halfbyte import _env
from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.nn.compute_dtype import default_compute_dtype
from halfbyte.nn.linear_4bit import Linear4bit
from halfbyte.nn.receipt import WARN_BELOW, Receipt, count

__all__ = ["Halfbyte4BitQuantizer", "Halfbyte8BitQuantizer", "loading_line"]

logger = logging.getLogger("halfbyte")


class _Damaged(dict[str, HalfbyteError]):
    """Weight -> its error. transformers copies operations, and with them their quantizer, for every weight."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Damaged:
        return self


class _Quantize(Bnb4bitQuantize):
    """Quantizes a weight; keeps the error of one that cannot be for the end of the loading."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return super().convert(input_dict, *args, **kwargs)
        except HalfbyteError as error:
            return _failed(self.hf_quantizer, error, *next(iter(input_dict.items())))


class _Deserialize(Bnb4bitDeserialize):
    """Reads a packed weight; keeps the error of a damaged one for the end of the loading."""

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        name, weight = str(full_layer_name), input_dict.get("weight")
        try:
            if len(input_dict) == 1 and isinstance(model.get_submodule(name.rpartition(".")[0]), Linear4bit):
                raise CheckpointError(
                    "packed 4-bit codes without their scales",
                    expected=f"{name}.absmax, {name}.quant_map and {name}.quant_state.* beside the weight",
                    hint="the checkpoint is truncated: download or save it again",
                )
            return super().convert(input_dict, model=model, full_layer_name=full_layer_name, **kwargs)
        except HalfbyteError as error:
            return {"weight": _failed(self.hf_quantizer, error, name, weight)[name]}


class Halfbyte4BitQuantizer(Bnb4BitHfQuantizer):
    """transformers' own 4-bit quantizer, with what it gets wrong put right."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.damaged = _Damaged()

    def get_quantize_ops(self) -> Any:
        """What quantizes a weight while it is loaded."""
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, Any]:
        """What reads a weight that was saved quantized."""
        return {"deserialize": _Deserialize}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.damaged:
            name, first = next(iter(self.damaged.items()))
            others = f" (and {len(self.damaged) - 1} more weights like it)" if len(self.damaged) > 1 else ""
            raise CheckpointError(f"{name}: {first.message}{others}", expected=first.expected, hint=first.hint)
        model = super()._process_model_after_weight_loading(model, **kwargs)
        _forget_load_operations(model, self.get_load_operations())
        _tell(model)
        return model

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """The model with plain linear layers of ``dtype`` (None: the dtype it was loaded in)."""
        return super().dequantize(model, _dtype(model.config.dtype if dtype is None else dtype))

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
        if not layers:
            logger.warning("dequantize: the model has no 4-bit layer and stays as it is")
            return model
        model = super()._dequantize(model, dtype)
        for name, layer in layers.items():
            if issubclass(getattr(layer, "source_cls", torch.nn.Linear), Conv1D):
                # Saved and loaded again, the weight must have the orientation that the model's class expects.
                model.set_submodule(name, _conv1d(model.get_submodule(name)))
        model.is_loaded_in_4bit = False
        return model


class Halfbyte8BitQuantizer(Bnb8BitHfQuantizer):
    """transformers' own 8-bit quantizer, with what it gets wrong put right."""

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        _forget_load_operations(model, self.get_load_operations())
        _tell(model)
        return model

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """The model with plain linear layers of ``dtype`` (None: the dtype it was loaded in)."""
        return super().dequantize(model, _dtype(model.config.dtype if dtype is None else dtype))


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


def _failed(quantizer: Any, error: HalfbyteError, name: str, weight: Any) -> dict[str, Any]:
    # transformers would bury an error in a table with tracebacks; the unusable weight lets it go on until we can raise.
    quantizer.damaged[name] = error
    weight = weight[0] if isinstance(weight, list) else weight
    return {name: torch.nn.Parameter(torch.empty(0) if weight is None else weight, requires_grad=False)}


def _forget_load_operations(model: Any, operations: dict[str, type]) -> None:
    # transformers would run them backwards when it saves, which they cannot; what the layers save is right as it is.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        kinds = tuple(operations.values())
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(isinstance(operation, kinds) for operation in getattr(conversion, "operations", ()))
        ]


def _dtype(named: torch.dtype | str) -> torch.dtype:
    # Saving a model leaves its config with the dtype's name.
    return getattr(torch, named.removeprefix("torch.")) if isinstance(named, str) else named


def _conv1d(linear: torch.nn.Linear) -> Conv1D:
    with torch.device("meta"):
        layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight = torch.nn.Parameter(linear.weight.data.t().contiguous())
    layer.bias = linear.bias
    return layer


auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = Halfbyte4BitQuantizer
auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"] = Halfbyte8BitQuantizer
