"""The linear layer of LLM.int8(): an int8 weight, int8 products, outliers of the activation in full precision."""

# CB and SCB are bitsandbytes' names, not constants.
# pyright: reportConstantRedefinition=false, reportIncompatibleVariableOverride=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.autograd import MatmulLtState, matmul
from halfbyte.nn.holds_8bit import Holds8bit
from halfbyte.nn.int8_params import Int8Params

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


class Linear8bitLt(Holds8bit, torch.nn.Linear):
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

    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _keeps_floats(self) -> bool:
        return self.state.has_fp16_weights
