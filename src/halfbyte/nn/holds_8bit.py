"""What every module with an int8 weight does alike: moving, saving and loading that weight with its scales."""

# CB and SCB are bitsandbytes' names, not constants.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError, CheckpointError, HalfbyteError
from halfbyte.functional import int8_vectorwise_dequant
from halfbyte.nn.int8_params import Int8Params
from halfbyte.nn.weight_formats import to_rows, weight_format_name

__all__ = ["Holds8bit"]


class Holds8bit(torch.nn.Module):
    """Base of modules whose ``weight`` is an Int8Params; stands before torch's own class."""

    weight: Any  # an Int8Params; wrappers put their own parameters here

    def weight_shape(self) -> tuple[int, int]:
        """Shape of the weight."""
        raise NotImplementedError

    def _keeps_floats(self) -> bool:
        """Whether the weight is quantized in each forward pass only."""
        return False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # torch would make a plain Parameter of codes that leave or reach the meta device.
        weight = self.weight
        if not isinstance(weight, Int8Params) or weight.has_fp16_weights:
            super()._apply(fn, recurse)
            return self
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)
            self.weight = weight.adopted(fn(weight))
        except BaseException:
            self._parameters["weight"] = weight
            raise
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scales = getattr(self.weight, "SCB", None)
        if scales is not None:
            destination[f"{prefix}SCB"] = scales if keep_vars else scales.detach()
            destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes int8 codes with their SCB, in any ``weight_format``, or plain values; whatever this layer holds now."""
        weight = state_dict.get(f"{prefix}weight")
        scales = state_dict.pop(f"{prefix}SCB", None)
        stored_format = state_dict.pop(f"{prefix}weight_format", "row")
        try:
            if weight is None and scales is not None:
                raise CheckpointError(f"{prefix}SCB without {prefix}weight", expected="both")
            loaded = None if weight is None else self._loadable(weight, scales, stored_format)
        except HalfbyteError as error:
            error_msgs.append(f"{prefix}weight: {error}")
            # Nothing else of the layer must change either.
            for name in self._parameters:
                state_dict.pop(prefix + name, None)
            return
        if loaded is not None:
            del state_dict[f"{prefix}weight"]
        shown: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, shown, unexpected_keys, error_msgs)
        missing_keys += [key for key in shown if loaded is None or key != f"{prefix}weight"]
        if loaded is not None:
            self._take(loaded)

    def _loadable(self, weight: Tensor, scales: Tensor | None, stored_format: Tensor | int | str) -> Int8Params | None:
        """The parameter that a state dict's weight becomes; None where torch can copy it as it is."""
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

    def _take(self, loaded: Int8Params) -> None:
        """Put what was loaded into the parameter, which optimizers and tied layers may hold, where torch allows."""
        weight = self.weight
        if not isinstance(weight, Int8Params) or weight.device != loaded.device:
            self.weight = loaded
            return
        weight.requires_grad = loaded.requires_grad
        weight.data = loaded.data
        weight.SCB = loaded.SCB
