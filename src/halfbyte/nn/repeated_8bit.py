"""The short way through an 8-bit layer: when its weight, scales and threshold are those of a call made before."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from halfbyte.autograd.matmul_8bit import repeated_matmul
from halfbyte.backends import registry
from halfbyte.nn.int8_params import Int8Params
from halfbyte.nn.repeated import Repeated, own_bias

__all__ = ["Repeated8bit"]

_is_grad_enabled = torch.is_grad_enabled


class Repeated8bit(Repeated):
    """Products of an 8-bit layer, by the activation's shape."""

    __slots__ = ("_addresses", "_scales", "_shape", "_threshold")

    def __init__(self, x: Tensor, weight: Int8Params, scales: Tensor, bias: Tensor | None, threshold: float) -> None:
        super().__init__(x, weight, bias)
        self._scales = weakref.ref(scales)
        self._addresses = (weight.data_ptr(), scales.data_ptr())
        self._shape, self._threshold = weight.shape, threshold

    def product(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's result, None where this is not, in every respect, a call that was made before."""
        call = self._call(self._calls, x)
        if call is None or registry.listened():
            return None
        bias = own_bias(layer)
        weight = layer._parameters.get("weight")
        if not self._has(bias) or not self._holds(weight, layer.state.threshold):
            return None
        if _is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return repeated_matmul(x, weight, weight.SCB, bias, self._threshold, call)
        return call(x)

    def _holds(self, weight: Any, threshold: float) -> bool:
        """Whether the weight's tensors are where they were."""
        if weight is None or weight is not self._weight() or threshold != self._threshold:
            return False
        scales = weight.SCB
        if scales is None or scales is not self._scales() or weight.shape != self._shape:
            return False
        return self._addresses == (weight.data_ptr(), scales.data_ptr())

    @staticmethod
    def after(layer: Any, x: Tensor, weight: Any) -> Repeated8bit | None:
        """What the layer keeps after the ordinary product with ``x``: as much as it had, if that still holds."""
        own: Repeated8bit | None = layer._repeated
        if own is not None and own._refused(x):
            return own
        bias, threshold = own_bias(layer), layer.state.threshold
        scales = getattr(weight, "SCB", None)
        if not isinstance(weight, Int8Params) or weight.dtype != torch.int8 or scales is None:
            return own
        if not registry.undisturbed(x) or not x.is_contiguous() or layer.bias is not bias:
            return own
        if own is None or not (own._fits(x) and own._has(bias) and own._holds(weight, threshold)):
            own = Repeated8bit(x, weight, scales, bias, threshold)
        if x.shape not in own._calls:
            # detach: kernels take plain tensors.
            call = registry.prepare("int8_linear", x, weight.detach(), scales, threshold, bias)
            own._keep(own._calls, x.shape, call)
        return own
