"""The short way through a quantized layer: a product made before is repeated without looking everything up again.

A decoding step of a large model on a GPU is bound by the host: what a layer does in Python before its kernel starts
counts more than the kernel. Backends offer to repeat a call (``prepare``); here and in the modules for 4 and 8 bits is
checked that it still is that call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["SHAPES", "Calls", "Repeated", "own_bias"]

SHAPES = 32
"""Shapes of activations that a layer remembers."""

Calls = dict[torch.Size, Callable[[Tensor], Tensor | None] | None]
"""What repeats a call, by the shape of its activation; None where the backend was asked and offers nothing."""

_UNKNOWN: Any = object()


def own_bias(layer: Any) -> Any:
    """The layer's bias; where each call computes it (``torch.nn.utils.parametrize``), what no bias equals."""
    return layer._parameters.get("bias", _UNKNOWN)


class Repeated:
    """Products of one layer with one weight and bias, for activations of one dtype and device.

    It keeps no tensor of the layer alive, and what is built from it by copying or pickling is None.
    """

    __slots__ = ("_bias", "_bias_address", "_calls", "_device", "_dtype", "_weight")

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weakref.ref(weight)
        self._bias = None if bias is None else weakref.ref(bias)
        self._bias_address = 0 if bias is None else bias.data_ptr()
        self._dtype, self._device = x.dtype, x.device
        self._calls: Calls = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def _fits(self, x: Tensor) -> bool:
        """Whether calls of this dtype and device are repeated here."""
        return x.dtype is self._dtype and x.device == self._device

    def _call(self, calls: Calls, x: Tensor) -> Callable[[Tensor], Tensor | None] | None:
        """What repeats a call with ``x``, if one like it was made before.

        Entered some hundred times for each token of a large model, so :meth:`_fits` is written out.
        """
        call = calls.get(x.shape)
        if call is None or x.dtype is not self._dtype or x.device != self._device or type(x) is not Tensor:
            return None
        return call if x.is_contiguous() else None

    def _refused(self, x: Tensor) -> bool:
        """Whether the backend was asked about such an activation, and offered nothing."""
        return self._calls.get(x.shape, _UNKNOWN) is None and self._fits(x)

    def _has(self, bias: Any) -> bool:
        """Whether the layer's own bias is where it was: nobody is told when a tensor's ``.data`` is set."""
        if bias is None or self._bias is None:
            return bias is None and self._bias is None
        return bias is self._bias() and bias.data_ptr() == self._bias_address

    @staticmethod
    def _keep(calls: Calls, shape: torch.Size, call: Callable[[Tensor], Tensor | None] | None) -> None:
        if len(calls) >= SHAPES:
            calls.clear()
        calls[shape] = call
