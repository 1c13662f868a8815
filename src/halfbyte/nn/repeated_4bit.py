"""The short way through a 4-bit layer: when its weight and scales are still those of a call made before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.autograd.matmul_4bit import repeated_matmul_4bit
from halfbyte.backends import registry
from halfbyte.functional import format_of, kernel_scales
from halfbyte.nn.repeated import Calls, Repeated, own_bias
from halfbyte.quant_state import QuantState, changes

__all__ = ["Repeated4bit"]

_DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass  # pyright: ignore[reportPrivateUsage]
_is_grad_enabled = torch.is_grad_enabled


class Repeated4bit(Repeated):
    """Products of a 4-bit layer and their gradients to the input, by the activation's shape."""

    __slots__ = ("_addresses", "_changes", "_compute_dtype", "_format", "_gradients", "_state")

    def __init__(self, layer: Any, weight: Tensor, state: QuantState, bias: Tensor | None, x: Tensor) -> None:
        super().__init__(x, weight, bias)
        self._state = weakref.ref(state)
        self._addresses = _addresses(weight, state)
        self._format = _format(state)
        self._changes = changes()
        self._compute_dtype = layer.compute_dtype
        self._gradients: Calls = {}

    def product(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's result, None where this is not, in every respect, a call that was made before."""
        call = self._call(self._calls, x)
        if call is None or layer.compute_dtype is not self._compute_dtype or registry.listened():
            return None
        bias = own_bias(layer)
        weight = layer._parameters.get("weight")
        if not self._has(bias) or not self._holds(weight):
            return None
        if _is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return repeated_matmul_4bit(x, weight, bias, layer, call)
        return call(x)

    def gradient(self, grad: Tensor, weight: Tensor) -> Tensor | None:
        """``grad @ weight``, None where this is not, in every respect, a call that was made before."""
        call = self._call(self._gradients, grad)
        if call is None or registry.listened() or (_is_grad_enabled() and grad.requires_grad):
            return None
        return call(grad) if self._holds(weight) else None

    def _holds(self, weight: Any) -> bool:
        """Whether the weight's tensors are where they were."""
        if weight is not self._weight():
            return False
        state = getattr(weight, "quant_state", None)
        if state is None or state is not self._state():
            return False
        packed, absmax, nested = self._addresses
        with _DisableTorchFunctionSubclass():  # the parameter's own __torch_function__ would answer every question
            if weight.data_ptr() != packed or state.absmax.data_ptr() != absmax:
                return False
            if nested is not None and nested != _nested_addresses(state):
                return False
        if changes() != self._changes:  # some state's attribute was set: of this one?
            if _format(state) != self._format:
                return False
            self._changes = changes()
        return True

    def learn(self, x: Tensor, weight: Tensor, state: QuantState, bias: Tensor | None) -> None:
        """Ask the backend for what repeats the product with ``x``, which was made by the ordinary way just now."""
        if x.shape not in self._calls:
            self._keep(self._calls, x.shape, _prepared("gemm_4bit", x, weight, state, bias))

    def learn_gradient(self, grad: Tensor, weight: Tensor, state: QuantState) -> None:
        """Ask the backend for what repeats ``grad @ weight``, just made by the ordinary way; contiguous."""
        fits = self._fits(grad) and not (_is_grad_enabled() and grad.requires_grad)
        if fits and grad.shape not in self._gradients and registry.undisturbed(grad) and self._holds(weight):
            self._keep(self._gradients, grad.shape, _prepared("gemm_4bit_dgrad", grad, weight, state))

    @staticmethod
    def after(layer: Any, x: Tensor, weight: Tensor, state: QuantState, bias: Tensor | None) -> Repeated4bit | None:
        """What the layer keeps after the ordinary product with ``x``: as much as it had, if that still holds."""
        own: Repeated4bit | None = layer._repeated
        if own is not None and own._refused(x):
            return own
        if bias is not own_bias(layer) or not registry.undisturbed(x) or not x.is_contiguous():
            return own
        same = own is not None and own._fits(x) and own._compute_dtype is layer.compute_dtype
        if own is None or not same or not (own._has(bias) and own._holds(weight)):
            own = Repeated4bit(layer, weight, state, bias, x)
        own.learn(x, weight, state, bias)
        return own


def _prepared(
    op: str, x: Tensor, weight: Tensor, state: QuantState, *bias: Tensor | None
) -> Callable[[Tensor], Tensor | None] | None:
    """What the backend offers for repeating ``op`` with tensors like ``x``."""
    shape, blocksize, kind, _ = format_of(state)
    scales = kernel_scales(state)
    if scales[0] is not state.absmax and scales[1] is None:
        # They were computed for one call and are freed after it: a kernel that kept their address would read whatever
        # lies there then.
        return None
    with _DisableTorchFunctionSubclass():
        return registry.prepare(op, x, weight, shape, scales[0], blocksize, kind, *bias, *scales[1:])


def _addresses(weight: Tensor, state: QuantState) -> tuple[int, int, tuple[int | None, ...] | None]:
    """Where everything lies that a kernel reads: nobody is told when a tensor's ``.data`` is set."""
    with _DisableTorchFunctionSubclass():
        nested = None if state.state2 is None else _nested_addresses(state)
        return weight.data_ptr(), state.absmax.data_ptr(), nested


def _nested_addresses(state: QuantState) -> tuple[int | None, ...]:
    second, offset = state.state2, state.offset
    if second is None:
        return ()
    code = second.code
    return (
        second.absmax.data_ptr(), None if code is None else code.data_ptr(),
        None if offset is None else offset.data_ptr(),
    )  # fmt: skip


def _format(state: QuantState) -> tuple[object, ...]:
    """What a kernel takes from a state beside the addresses that are looked at in every call."""
    second = state.state2
    nested = None if second is None else (second.blocksize, second.nested)
    return state.shape, state.blocksize, state.quant_type, state.nested, nested
