"""transformers' 4-bit conversions with readable errors: a weight that cannot be used is reported by its name."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb4bitQuantize

from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.nn.linear_4bit import Linear4bit

__all__ = ["Damaged", "Deserialize4bit", "Quantize4bit"]


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


class Quantize4bit(Bnb4bitQuantize):
    """Quantizes a weight; keeps the error of one that cannot be for the end of the loading."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return super().convert(input_dict, *args, **kwargs)
        except HalfbyteError as error:
            name, weight = next(iter(input_dict.items()))
            return {name: self.hf_quantizer.damaged.keep(error, name, weight)}


class Deserialize4bit(Bnb4bitDeserialize):
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
