"""Small quantized layers, and a backend that offers to repeat their products with what it saw when it was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.backends import registry
from halfbyte.backends.reference import four_bit, int8
from halfbyte.backends.registry import Backend, implements
from halfbyte.nn import Linear4bit, Linear8bitLt
from tests.support.int8_inputs import THRESHOLD, activations
from tests.support.listening import Listener

__all__ = [
    "LAYERS",
    "K",
    "N",
    "X",
    "linear_4bit",
    "linear_8bit",
    "misaligned",
    "offer_gradients",
    "ordinary",
    "repeating",
]

NAME = "repeating"
N, K = 32, 64
X = activations(3, K)


def linear_4bit(seed: int = 0, *, nested: bool = True, bias: bool = True) -> Linear4bit:
    torch.manual_seed(seed)
    return Linear4bit(K, N, bias, torch.float32, nested, "nf4").to("cpu")


def linear_8bit(seed: int = 0, *, bias: bool = True) -> Linear8bitLt:
    torch.manual_seed(seed)
    return Linear8bitLt(K, N, bias, has_fp16_weights=False, threshold=THRESHOLD).to("cpu")


LAYERS: dict[str, Callable[..., Any]] = {"4 bits": linear_4bit, "8 bits": linear_8bit}


def ordinary(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """The product by the ordinary way: a mode that listens keeps layers from the short one."""
    with Listener():
        return layer(x)


def misaligned(x: Tensor) -> Tensor:
    """The same values in memory that does not begin where kernels want it."""
    return torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)


def _frozen(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().clone()


@contextmanager
def repeating() -> Iterator[list[torch.Size]]:
    """Registers the backend, and lists the shapes of activations whose products it repeated.

    It offers nothing for fp16 ones, and where memory is not aligned what it offered gives no product.
    """
    seen: list[torch.Size] = []

    def prepare_4bit(
        x: Tensor, packed: Tensor, shape: Any, absmax: Tensor, *rest: Any
    ) -> Callable[[Tensor], Tensor | None] | None:
        if x.dtype == torch.float16:
            return None
        blocksize, kind, bias, *nested = rest
        weight = four_bit.dequantize_4bit(packed, absmax, blocksize, kind, shape, x.dtype, *nested)
        added = _frozen(bias)

        def call(x: Tensor) -> Tensor | None:
            if x.data_ptr() % 16:
                return None
            seen.append(x.shape)
            return F.linear(x, weight, added)

        return call

    def prepare_8bit(
        x: Tensor, CB: Tensor, SCB: Tensor, threshold: float, bias: Tensor | None
    ) -> Callable[[Tensor], Tensor | None] | None:
        if x.dtype == torch.float16:
            return None
        codes, scales, added = CB.clone(), SCB.clone(), _frozen(bias)

        def call(x: Tensor) -> Tensor | None:
            if x.data_ptr() % 16:
                return None
            seen.append(x.shape)
            return int8.int8_linear(x, codes, scales, threshold, added)

        return call

    registry.register(Backend(NAME, frozenset({"cpu"}), 99, "halfbyte.backends.reference"))
    try:
        implements(NAME, "gemm_4bit", prepare=prepare_4bit)(four_bit.gemm_4bit)
        implements(NAME, "int8_linear", prepare=prepare_8bit)(int8.int8_linear)
        implements(NAME, "int8_linear_dgrad")(lambda grad, *weight: int8.int8_linear_dgrad(grad.detach(), *weight))
        yield seen
    finally:
        registry.unregister(NAME)


def offer_gradients() -> list[torch.Size]:
    """The registered backend offers to repeat gradients to a 4-bit layer's input as well; lists their shapes."""
    seen: list[torch.Size] = []

    def prepare(grad: Tensor, packed: Tensor, shape: Any, absmax: Tensor, *rest: Any) -> Callable[[Tensor], Tensor]:
        blocksize, kind, *nested = rest
        weight = four_bit.dequantize_4bit(packed, absmax, blocksize, kind, shape, grad.dtype, *nested)

        def call(grad: Tensor) -> Tensor:
            seen.append(grad.shape)
            return grad.detach() @ weight  # kernels have no gradients

        return call

    implements(NAME, "gemm_4bit_dgrad", prepare=prepare)(four_bit.gemm_4bit_dgrad)
    return seen
