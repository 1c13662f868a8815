"""The short way through an 8-bit layer: a product that was made before is repeated without looking everything up again.

On a GPU an ordinary call of a layer costs the host more than the kernels cost the GPU. Backends offer to repeat a call
(``prepare``); here is checked that it still is that call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.autograd.matmul_8bit import repeated_matmul
from halfbyte.backends import registry
from halfbyte.nn.int8_params import Int8Params

__all__ = ["Repeated8bit"]

SHAPES = 32
"""Shapes of activations that a layer remembers."""

_is_grad_enabled = torch.is_grad_enabled
_UNKNOWN: Any = object()


class Repeated8bit:
    """Products of one layer with one weight and threshold, by the activation's shape.

    It keeps neither weight nor scales alive, and what is built from it by copying or pickling is None.
    """

    __slots__ = ("_addresses", "_bias", "_calls", "_device", "_dtype", "_scales", "_shape", "_threshold", "_weight")

    def __init__(self, x: Tensor, weight: Int8Params, scales: Tensor, bias: Tensor | None, threshold: float) -> None:
        self._weight, self._scales = weakref.ref(weight), weakref.ref(scales)
        self._bias = None if bias is None else weakref.ref(bias)
        # Nobody is told when a tensor's .data is set.
        self._addresses = (weight.data_ptr(), scales.data_ptr(), 0 if bias is None else bias.data_ptr())
        self._shape, self._threshold = weight.shape, threshold
        self._dtype, self._device = x.dtype, x.device
        self._calls: dict[torch.Size, Callable[[Tensor], Tensor | None] | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def product(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's result, None where this is not, in every respect, a call that was made before."""
        call = self._calls.get(x.shape)
        if call is None or x.dtype is not self._dtype or x.device != self._device or type(x) is not Tensor:
            return None
        parameters = layer._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if not x.is_contiguous() or registry.listened() or not self._holds(weight, bias, layer.state.threshold):
            return None
        if _is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return repeated_matmul(x, weight, weight.SCB, bias, self._threshold, call)
        return call(x)

    def _holds(self, weight: Any, bias: Tensor | None, threshold: float) -> bool:
        """Whether the layer's tensors are where they were."""
        if weight is None or weight is not self._weight() or threshold != self._threshold:
            return False
        scales = weight.SCB
        if scales is None or scales is not self._scales() or weight.shape != self._shape:
            return False
        codes, stats, added = self._addresses
        if weight.data_ptr() != codes or scales.data_ptr() != stats:
            return False
        if bias is None or self._bias is None:
            return bias is None and self._bias is None
        return bias is self._bias() and bias.data_ptr() == added

    def _refused(self, x: Tensor) -> bool:
        """Whether the backend was asked about such an activation, and offered nothing."""
        return self._calls.get(x.shape, _UNKNOWN) is None and x.dtype is self._dtype and x.device == self._device

    @staticmethod
    def after(layer: Any, x: Tensor, weight: Any) -> Repeated8bit | None:
        """What the layer keeps after the ordinary product with ``x``: as much as it had, if that still holds."""
        own: Repeated8bit | None = layer._repeated
        if own is not None and own._refused(x):
            return own
        bias, threshold = layer._parameters["bias"], layer.state.threshold
        scales = getattr(weight, "SCB", None)
        if not isinstance(weight, Int8Params) or weight.dtype != torch.int8 or scales is None:
            return own
        if not registry.undisturbed(x) or not x.is_contiguous() or layer.bias is not bias:
            return own
        fits = own is not None and own._dtype is x.dtype and own._device == x.device
        if own is None or not fits or not own._holds(weight, bias, threshold):
            own = Repeated8bit(x, weight, scales, bias, threshold)
        if own._calls.get(x.shape, _UNKNOWN) is _UNKNOWN:
            if len(own._calls) >= SHAPES:
                own._calls.clear()
            # detach: kernels take plain tensors.
            own._calls[x.shape] = registry.prepare("int8_linear", x, weight.detach(), scales, threshold, bias)
        return own
