"""The linear layer of LLM.int8(): an int8 weight, int8 products, outliers of the activation in full precision."""

# CB and SCB are bitsandbytes' names, not constants.
# pyright: reportConstantRedefinition=false, reportIncompatibleVariableOverride=false

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from halfbyte.autograd import MatmulLtState, matmul
from halfbyte.errors import ArgumentError, CheckpointError
from halfbyte.nn.holds_8bit import Holds8bit
from halfbyte.nn.int8_params import Int8Params
from halfbyte.nn.repeated_8bit import Repeated8bit
from halfbyte.nn.weight_formats import to_rows

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


class _Own:
    """The layer's weight, not kept alive; what is built from it by copying or pickling is None."""

    def __init__(self, weight: Int8Params) -> None:
        self.weight = weakref.ref(weight)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


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
        memory_efficient_backward: Only False, for calls written against bitsandbytes before 0.45.

    Raises:
        ArgumentError: ``memory_efficient_backward``, by name or in its old place.

    Source: Dettmers et al. 2022, arXiv:2208.07339.

    >>> layer = Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0).to("cpu")
    >>> layer.weight.dtype, layer.weight.SCB.shape, layer(torch.zeros(2, 64)).shape
    (torch.int8, torch.Size([32]), torch.Size([2, 32]))
    """

    bias: Any
    _repeated: Repeated8bit | None = None
    _own: _Own | None = None

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | int | None = None,
        *,
        memory_efficient_backward: bool = False,
    ) -> None:
        if memory_efficient_backward or isinstance(threshold, bool):
            # It stood before the threshold once: by position it would pass for one.
            raise ArgumentError(
                f"Linear8bitLt with memory_efficient_backward={memory_efficient_backward}, threshold={threshold}",
                expected="no memory_efficient_backward: bitsandbytes dropped it in 0.45, and gradients never need it",
                hint="name what follows: Linear8bitLt(..., threshold=6.0)",
            )
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
        if not torch.compiler.is_compiling() and self._repeated is not None:
            repeated = self._repeated.product(self, x)
            if repeated is not None:
                return repeated
        weight = self.weight
        if not self.state.has_fp16_weights and isinstance(weight, Int8Params) and weight.is_floating_point():
            # Never moved since it was made: the move quantizes.
            self.weight = weight = weight.to(weight.device)
        if torch.compiler.is_compiling():
            return matmul(x, weight, state=self._traced_state(weight), bias=self.bias)
        result = matmul(x, weight, state=self.state, bias=self.bias)
        if self._own is None or self._own.weight() is not weight:
            self._remember("weight")
        self.__dict__["_repeated"] = Repeated8bit.after(self, x, weight)
        return result

    def _traced_state(self, weight: Tensor) -> MatmulLtState:
        """torch.export puts plain codes in the weight's place while it traces: the scales are those of the weight."""
        if isinstance(weight, Int8Params):
            return self.state
        own = None if self._own is None else self._own.weight()
        if own is None or weight.dtype != torch.int8 or weight.shape != own.shape:
            return self.state
        state = MatmulLtState(CB=weight, SCB=own.SCB)
        state.threshold, state.has_fp16_weights = self.state.threshold, False
        return state

    def _remember(self, name: str) -> None:
        weight = self._parameters.get(name)
        self.__dict__["_own"] = _Own(weight) if isinstance(weight, Int8Params) else None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight" and isinstance(value, Int8Params):
            self._remember(name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        held: MatmulLtState = self.__dict__["state"]  # bitsandbytes pickled a state without its layer
        if not isinstance(held, LayerState):
            self._take_over(held)
        self._remember("weight")

    def _take_over(self, old: MatmulLtState) -> None:
        """Become a layer of halfbyte's after bitsandbytes pickled it: codes and scales lie in one of three places.

        Raises:
            CheckpointError: Codes without scales.
        """
        fields = vars(old)
        self.state = LayerState(self)
        for name in ("threshold", "has_fp16_weights", "is_training", "use_pool"):
            setattr(self.state, name, fields.get(name, getattr(self.state, name)))
        weight = self._parameters["weight"]
        if weight is None or isinstance(weight, Int8Params):
            return
        marks = {name: value for name, value in vars(weight).items() if name not in {"CB", "SCB", "has_fp16_weights"}}
        marks["has_fp16_weights"] = self.state.has_fp16_weights
        if weight.is_floating_point():
            self.weight = Int8Params(weight.data, requires_grad=weight.requires_grad, **marks)
            return
        kept = [fields.get("SCB"), getattr(weight, "SCB", None)]
        scales = next((value for value in kept if value is not None), None)
        if scales is None:
            raise CheckpointError("a pickled 8-bit layer without its scales", expected="SCB in its state or weight")
        layout = fields.get("formatB") or "row"
        codes = weight.data
        if fields.get("CxB") is not None:  # releases up to 0.44, after a product on a GPU
            shape = (self.out_features, self.in_features)
            codes = to_rows(fields["CxB"], layout, shape)
        elif fields.get("CB") is not None:
            codes = fields["CB"]
        self.weight = Int8Params(codes, requires_grad=False, SCB=scales.float().view(-1).to(codes.device), **marks)

    def init_8bit_state(self) -> None:
        """Kept for callers: the state reads codes and scales from the weight at any time."""

    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _keeps_floats(self) -> bool:
        return self.state.has_fp16_weights
