"""LoRA around a 4-bit layer, and what peft's own forward makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from halfbyte.nn import Linear4bit

__all__ = ["Doubled", "X", "close", "lora", "ordinary", "results"]


X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(7))


class Model(torch.nn.Module):
    is_loaded_in_4bit = True  # as transformers marks it; peft asks

    def __init__(self, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.proj = Linear4bit(64, 48, bias, dtype, quant_type="nf4").to("cpu")
        self.proj.requires_grad_(False)
        if bias:
            self.proj.bias.data = self.proj.bias.data.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def lora(dtype: torch.dtype = torch.float32, bias: bool = False, **settings: Any) -> Any:
    """peft's layer around a 4-bit one, its adapter made to count."""
    torch.manual_seed(3)
    config = LoraConfig(r=8, lora_alpha=24, target_modules=["proj"], **settings)
    layer = get_peft_model(Model(dtype, bias), config, autocast_adapter_dtype=False).base_model.model.proj
    for name in ("lora_A", "lora_B"):
        for module in layer._modules[name].values():
            module.weight.data = (torch.randn(module.weight.shape) * 0.2).to(dtype)
    return layer


def ordinary(layer: Any, x: Tensor) -> Tensor:
    return type(layer).forward.__wrapped__(layer, x)


def results(call: Callable[[Any, Tensor], Tensor], layer: Any, x: Tensor) -> list[Tensor]:
    """The product and the gradients of the sum of its squares."""
    x = x.clone().requires_grad_()
    torch.manual_seed(11)
    product = call(layer, x)
    found = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [product.detach(), *torch.autograd.grad(product.float().square().sum(), [x, *found])]


def close(found: list[Tensor], expected: list[Tensor], within: float = 1e-6) -> None:
    """Every tensor's distance, relative to the expected one's length, is small."""
    for own, right in zip(found, expected, strict=True):
        assert own.shape == right.shape
        assert (own - right).float().norm() <= within * right.float().norm()


class Doubled(torch.nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 2
