"""What every module with an int8 weight does alike: moving, saving and loading that weight with its scales."""

# CB and SCB are bitsandbytes' names, not constants.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError, CheckpointError
from halfbyte.functional import int8_vectorwise_dequant
from halfbyte.nn.holds import Holds
from halfbyte.nn.int8_params import Int8Params
from halfbyte.nn.weight_formats import to_rows, weight_format_name

__all__ = ["Holds8bit"]


class Holds8bit(Holds):
    """Base of modules whose ``weight`` is an Int8Params; stands before torch's own class."""

    weight: Any  # an Int8Params; wrappers put their own parameters here

    def weight_shape(self) -> tuple[int, int]:
        """Shape of the weight."""
        raise NotImplementedError

    def _keeps_floats(self) -> bool:
        """Whether the weight is quantized in each forward pass only."""
        return False

    def _moves_itself(self, parameter: Any) -> bool:
        return isinstance(parameter, Int8Params) and not parameter.has_fp16_weights

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scales = getattr(self.weight, "SCB", None)
        if scales is not None:
            destination[f"{prefix}SCB"] = scales if keep_vars else scales.detach()
            destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)

    def _loadable(self, name: str, state_dict: dict[str, Any], prefix: str, assign: bool) -> Int8Params | None:
        del assign  # the codes may have to be put into rows: they are always copied
        weight = state_dict.get(f"{prefix}{name}")
        scales = state_dict.pop(f"{prefix}SCB", None)
        stored_format = state_dict.pop(f"{prefix}weight_format", "row")
        if weight is None:
            if scales is not None:
                raise CheckpointError(f"{prefix}SCB without {prefix}{name}", expected="both")
            return None
        return self._from_stored(weight, scales, stored_format)

    def _from_stored(
        self, weight: Tensor, scales: Tensor | None, stored_format: Tensor | int | str
    ) -> Int8Params | None:
        device = weight.device if self.weight.device.type == "meta" else self.weight.device
        shape = self.weight_shape()
        if weight.dtype == torch.int8:
            if scales is None:
                raise CheckpointError(
                    "int8 codes without their SCB",
                    expected="SCB beside the weight",
                    hint="save the whole state dict of the 8-bit layer",
                )
            codes = to_rows(weight.detach(), weight_format_name(stored_format), shape).to(device, copy=True)
            if scales.numel() != shape[0]:
                raise CheckpointError(f"SCB has {scales.numel()} values", expected=f"{shape[0]}")
            scales = scales.detach().float().view(-1).to(device, copy=True)
            if not self._keeps_floats():
                return Int8Params(codes, requires_grad=False, SCB=scales)
            values = int8_vectorwise_dequant(codes, scales).to(self.weight.dtype)
            return Int8Params(values, requires_grad=self.weight.requires_grad, has_fp16_weights=True)
        if scales is not None:
            raise CheckpointError(f"SCB beside a weight of {weight.dtype}", expected="int8")
        if self.weight.is_floating_point():
            return None
        if tuple(weight.shape) != shape:
            raise CheckpointError(f"a weight of shape {tuple(weight.shape)}", expected=f"{shape}")
        try:
            return Int8Params(weight.detach().clone(), requires_grad=False).to(device)
        except ArgumentError as error:
            raise CheckpointError(str(error)) from error

    def _take(self, name: str, loaded: Int8Params, assign: bool) -> None:
        """Put what was loaded into the parameter, which optimizers and tied layers may hold, where torch allows."""
        del assign
        weight = getattr(self, name)
        if not isinstance(weight, Int8Params) or weight.device != loaded.device:
            setattr(self, name, loaded)
            return
        weight.requires_grad = loaded.requires_grad
        weight.data = loaded.data
        weight.SCB = loaded.SCB
