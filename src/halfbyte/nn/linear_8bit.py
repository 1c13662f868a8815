"""The linear layer of LLM.int8(): an int8 weight, int8 products, outliers of the activation in full precision."""

# CB and SCB are bitsandbytes' names, not constants.
# pyright: reportConstantRedefinition=false, reportIncompatibleVariableOverride=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.autograd import MatmulLtState, matmul
from halfbyte.errors import ArgumentError, CheckpointError, HalfbyteError
from halfbyte.functional import int8_vectorwise_dequant
from halfbyte.nn.int8_params import Int8Params
from halfbyte.nn.weight_formats import to_rows, weight_format_name

__all__ = ["LayerState", "Linear8bitLt"]


class LayerState(MatmulLtState):
    """A layer's settings. Its ``CB`` and ``SCB`` are those of the layer's weight, read or set; they cannot be unset."""

    def __init__(self, layer: Linear8bitLt) -> None:
        super().__init__()
        self._layer = layer

    @property
    def _weight(self) -> Int8Params | None:
        weight = getattr(self.__dict__.get("_layer"), "weight", None)  # torch 2.8 compiles no vars()
        return weight if isinstance(weight, Int8Params) else None

    @property
    def CB(self) -> Tensor | None:  # noqa: N802
        """int8 codes of the layer's weight."""
        return None if self._weight is None else self._weight.CB

    @CB.setter
    def CB(self, value: Tensor | None) -> None:  # noqa: N802
        if self._weight is not None:
            self._weight.CB = value

    @CB.deleter
    def CB(self) -> None:  # noqa: N802
        pass

    @property
    def SCB(self) -> Tensor | None:  # noqa: N802
        """fp32 absmax of the rows of the layer's weight."""
        return None if self._weight is None else self._weight.SCB

    @SCB.setter
    def SCB(self, value: Tensor | None) -> None:  # noqa: N802
        if self._weight is not None and value is not None:
            self._weight.SCB = value


class Linear8bitLt(torch.nn.Linear):
    """``torch.nn.Linear`` by LLM.int8().

    Args:
        input_features: Length of the input's last dimension.
        output_features: Length of the output's last dimension.
        bias: Whether there is one; it stays in its own dtype.
        has_fp16_weights: Keep the weight in 16 or 32 bits, trainable, and quantize it in each forward pass. False
            quantizes it for good on its first move to a device.
        threshold: Activations of at least this magnitude are multiplied in full precision (6.0 in the paper); 0 puts
            everything into int8.
        index: Kept for callers that set it.
        device: Where the unquantized weight is created.

    Source: Dettmers et al. 2022, arXiv:2208.07339.

    >>> layer = Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0).to("cpu")
    >>> layer.weight.dtype, layer.weight.SCB.shape, layer(torch.zeros(2, 64)).shape
    (torch.int8, torch.Size([32]), torch.Size([2, 32]))
    """

    weight: Any  # an Int8Params; wrappers put their own parameters here
    bias: Any

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.state = LayerState(self)
        self.state.threshold = threshold
        self.state.has_fp16_weights = has_fp16_weights
        self.state.use_pool = threshold > 0.0 and not has_fp16_weights
        self.index = index
        self.weight = Int8Params(self.weight.data, has_fp16_weights=has_fp16_weights, requires_grad=has_fp16_weights)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``x @ weight.T + bias`` in x's dtype."""
        self.state.is_training = self.training
        weight = self.weight
        if not self.state.has_fp16_weights and isinstance(weight, Int8Params) and weight.is_floating_point():
            # Never moved since it was made: the move quantizes.
            self.weight = weight = weight.to(weight.device)
        return matmul(x, weight, state=self.state, bias=self.bias)

    def init_8bit_state(self) -> None:
        """Kept for callers: the state reads codes and scales from the weight at any time."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear8bitLt:
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
            # The bias must not change either.
            for name in ("weight", "bias"):
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
        shape = (self.out_features, self.in_features)
        if weight.dtype == torch.int8:
            if scales is None:
                raise CheckpointError(
                    "int8 codes without their SCB",
                    expected="SCB beside the weight",
                    hint="save the whole state dict of the 8-bit layer",
                )
            codes = to_rows(weight.detach(), weight_format_name(stored_format), shape).to(device, copy=True)
            if scales.numel() != self.out_features:
                raise CheckpointError(f"SCB has {scales.numel()} values", expected=f"{self.out_features}")
            scales = scales.detach().float().view(-1).to(device, copy=True)
            if not self.state.has_fp16_weights:
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
