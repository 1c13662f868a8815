"""LoRA of peft on 4-bit layers: the plain case, which nearly everyone trains, in one step instead of seven.

Importing this module changes nothing; ``libraries.watch`` calls ``extend`` when peft's layers are loaded.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.autograd.low_rank_4bit import low_rank_matmul_4bit
from halfbyte.backends import registry
from halfbyte.nn import Linear4bit, fix_4bit_weight_quant_state_from_module

__all__ = ["extend"]

_any_global_hook: Callable[[], object] = torch.nn.modules.module._has_any_global_hook  # pyright: ignore[reportPrivateUsage]


def extend() -> None:
    """Let peft's 4-bit LoRA layer ask first whether its product and the adapter's can be one step."""
    layer: Any = getattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear4bit", None)  # not without bitsandbytes
    if layer is not None and not hasattr(layer.forward, "__wrapped__"):
        layer.forward = _extended(layer.forward)


def _extended(ordinary: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(ordinary)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args and not kwargs and not torch.compiler.is_compiling():
            result = _one_step(self, x)
            if result is not None:
                return result
        return ordinary(self, x, *args, **kwargs)

    return forward


def _one_step(layer: Any, x: Tensor) -> Tensor | None:
    """The layer's result; None wherever anything but one plain adapter beside a frozen 4-bit layer is asked for.

    What decides must not differ between a forward pass and its repetition in the backward pass.
    """
    if layer.disable_adapters or layer.merged or type(x) is not Tensor or registry.transformed() or _any_global_hook():
        return None
    modules = layer._modules
    active, downs = layer.active_adapters, modules["lora_A"]._modules
    variants = getattr(layer, "lora_variant", None)  # not in old versions of peft, which have other flags
    if variants is None or len(active) != 1 or active[0] not in downs or active[0] in variants:
        return None
    name, scaling = active[0], layer.scaling[active[0]]
    base, down, up = modules["base_layer"], downs[name], modules["lora_B"]._modules[name]
    if not (_is_plain(base, Linear4bit) and _is_plain(down, torch.nn.Linear) and _is_plain(up, torch.nn.Linear)):
        return None
    if type(scaling) not in (float, int):
        return None
    own, first, second = base._parameters, down._parameters, up._parameters  # a third of the time of ``base.weight``
    if first["bias"] is not None or second["bias"] is not None:
        return None
    if (own["bias"] is not None and own["bias"].requires_grad) or not _fits(x, base, first["weight"], second["weight"]):
        return None
    dropout = modules["lora_dropout"]._modules[name]
    dropped = None if _is_idle(dropout) else dropout(x)
    return low_rank_matmul_4bit(x, base, first["weight"], second["weight"], scaling, dropped)


def _is_plain(module: Any, kind: type[torch.nn.Module]) -> bool:
    """Whether calling the module runs its class's own forward on parameters of its own, and nothing else."""
    own = module._parameters  # torch's parametrizations and FSDP's flat parameters take them out
    return _runs_only(module, kind) and "weight" in own and "bias" in own


def _runs_only(module: Any, kind: type[torch.nn.Module]) -> bool:
    if type(module).forward is not kind.forward or "forward" in vars(module):
        return False
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_idle(dropout: Any) -> bool:
    """Whether calling it gives back what it is given; it has a training mode of its own."""
    kind: type[torch.nn.Module] = type(dropout)
    if kind is torch.nn.Identity or (kind is torch.nn.Dropout and not dropout.training):
        return _runs_only(dropout, kind)
    return False


def _fits(x: Tensor, base: Any, down: Any, up: Any) -> bool:
    """Whether peft would compute both products in the layer's compute dtype, on parameters that are whole."""
    parameter = torch.nn.Parameter
    if type(down) is not parameter or type(up) is not parameter or down.dtype is not up.dtype or x.dim() < 2:
        return False
    fix_4bit_weight_quant_state_from_module(base)  # as the layer itself does, after sharding wrappers
    kind, dtype = x.device.type, base.compute_dtype_for(x)
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind) is dtype and x.dtype in (dtype, torch.float32)
    return down.dtype is x.dtype is dtype
