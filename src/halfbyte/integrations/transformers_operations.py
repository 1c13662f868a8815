"""transformers' 4-bit conversions with readable errors: a weight that cannot be used is reported by its name."""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb4bitQuantize

from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.integrations.transformers_experts import is_expert
from halfbyte.nn.holds_4bit import loadable
from halfbyte.nn.linear_4bit import Linear4bit
from halfbyte.nn.params import Params4bit

__all__ = ["Damaged", "Deserialize4bit", "DeserializeExperts", "Quantize4bit"]


class Damaged(dict[str, HalfbyteError]):
    """Weight -> its error. transformers copies operations, and with them their quantizer, for every weight."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Damaged:
        return self

    def keep(self, error: HalfbyteError, name: str, weight: Any) -> torch.nn.Parameter:
        """Note the error. The unusable weight lets transformers go on, which would bury an error in a table."""
        self[name] = error
        weight = weight[0] if isinstance(weight, list) else weight
        return torch.nn.Parameter(torch.empty(0) if weight is None else weight, requires_grad=False)

    def raise_first(self) -> None:
        """Raise for the first weight noted, if any.

        Raises:
            CheckpointError: Always where there is one.
        """
        for name, error in self.items():
            others = f" (and {len(self) - 1} more weights like it)" if len(self) > 1 else ""
            raise CheckpointError(f"{name}: {error.message}{others}", expected=error.expected, hint=error.hint)


class _Noting:
    """What our operations have in common: they note errors with the quantizer, which raises them in the end."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer
        vars(hf_quantizer).setdefault("damaged", Damaged())  # copies of the quantizer share it


class Quantize4bit(_Noting, Bnb4bitQuantize):
    """Quantizes a weight; keeps the error of one that cannot be for the end of the loading."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            if is_expert(kwargs["model"], next(iter(input_dict))):
                return {name: _quantized(kwargs["model"], name, weight) for name, weight in input_dict.items()}
            return super().convert(input_dict, *args, **kwargs)
        except HalfbyteError as error:
            name, weight = next(iter(input_dict.items()))
            return {name: self.hf_quantizer.damaged.keep(error, name, weight)}


class Deserialize4bit(_Noting, Bnb4bitDeserialize):
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
            return {"weight": self.hf_quantizer.damaged.keep(error, name, weight)}


class DeserializeExperts(_Noting, ConversionOps):
    """Reads the packed weights of a layer's experts, or plain ones from a checkpoint that left them alone."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        del args
        model, name = kwargs["model"], str(kwargs["full_layer_name"])
        values = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        own = min(values, key=len)
        weight = values.pop(own)
        try:
            return {name: _expert(model, name, weight, values)}
        except HalfbyteError as error:
            return {name: self.hf_quantizer.damaged.keep(error, name, weight)}


def _expert(model: Any, name: str, weight: torch.Tensor, stats: dict[str, Any]) -> torch.nn.Parameter:
    fresh = model.get_parameter(name)
    if not stats and weight.shape == fresh.shape:
        return torch.nn.Parameter(weight.to(fresh.dtype), requires_grad=False)
    loaded = loadable(fresh, tuple(fresh.shape), weight, stats, assign=True)
    if loaded is None:
        raise CheckpointError(f"experts of shape {tuple(weight.shape)}", expected=f"{tuple(fresh.shape)}")
    return loaded


def _quantized(model: Any, name: str, weight: Any) -> Params4bit:
    weight = weight[0] if isinstance(weight, list) else weight
    fresh = model.get_parameter(name)
    if weight.shape != fresh.shape:
        raise CheckpointError(f"experts of shape {tuple(weight.shape)}", expected=f"{tuple(fresh.shape)}")
    settings: dict[str, Any] = {**vars(fresh), "requires_grad": False}
    return Params4bit(weight, **settings).to(weight.device)
