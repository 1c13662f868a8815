"""4-bit parameters of any module, under bitsandbytes' names: packed where they are kept, dequantized when read."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from halfbyte.functional import dequantize_4bit, quantize_4bit
from halfbyte.quant_state import QuantState

__all__ = ["Bnb4bitParametrization", "replace_parameter_4bit", "replace_parameter_4bit_prequantized"]


class Bnb4bitParametrization(torch.nn.Module):
    """Reads a packed parameter as the values that its codes stand for. They get no gradient.

    Args:
        quant_state: State of the packed parameter.
    """

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        """The values, in their original shape and dtype, on the device of the codes."""
        if self.quant_state.absmax.device != quantized_param.device:
            self.quant_state = self.quant_state.copy_to(quantized_param.device)
        return dequantize_4bit(quantized_param, self.quant_state)


def replace_parameter_4bit(
    module: torch.nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize a parameter of ``module``, in place; whoever reads it gets the dequantized values.

    The state dict keeps the parameter's name, with its state beside it as for 4-bit layers, and loads into a module
    whose parameter was replaced too.

    Args:
        module: Any module.
        param_name: Name of one of its own parameters, of any shape.
        compress_statistics: Double quantization of the scales.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: Values per block; None is 64.

    Raises:
        AttributeError: There is no such attribute.
        TypeError: It is no parameter.
        ArgumentError: A dtype or setting that there is not.

    >>> layer = torch.nn.Conv1d(16, 8, 3)
    >>> replace_parameter_4bit(layer, "weight")
    >>> tuple(layer.weight.shape), tuple(layer.state_dict()["weight"].shape)
    ((8, 16, 3), (192, 1))
    """
    original = _parameter(module, param_name)
    packed, state = quantize_4bit(
        original.data, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    setattr(module, param_name, torch.nn.Parameter(packed, requires_grad=False))
    _parametrize(module, param_name, state)


def replace_parameter_4bit_prequantized(
    module: torch.nn.Module, param_name: str, qs_dict: dict[str, Any], device: torch.device | str | int
) -> None:
    """Read a parameter that holds packed codes already as the values that they stand for.

    Args:
        module: Any module.
        param_name: Name of one of its own parameters: packed codes.
        qs_dict: Their serialized state, as ``QuantState.from_dict`` reads it.
        device: Where the state goes.

    Raises:
        AttributeError: There is no such attribute.
        TypeError: It is no parameter.
        CheckpointError: The state is damaged.
    """
    _parameter(module, param_name)
    _parametrize(module, param_name, QuantState.from_dict(qs_dict, device))


def _parameter(module: torch.nn.Module, name: str) -> torch.nn.Parameter:
    # Built-in errors, since scripts written for bitsandbytes catch these.
    if not hasattr(module, name):
        raise AttributeError(f"{type(module).__name__} has no parameter {name!r}")
    found = getattr(module, name)
    if not isinstance(found, torch.nn.Parameter):
        raise TypeError(f"{name!r} of {type(module).__name__} is a {type(found).__name__}, not a torch.nn.Parameter")
    return found


def _parametrize(module: torch.nn.Module, name: str, state: QuantState) -> None:
    packed: Any = module.get_parameter(name)
    packed.quant_state = state  # the receipt counts by it
    parametrize.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    _register_parametrization_hooks(module, name)


def _register_parametrization_hooks(module: torch.nn.Module, param_name: str) -> None:
    module.register_state_dict_post_hook(partial(_parametrized_state_dict_post_hook, param_name=param_name))
    module.register_load_state_dict_pre_hook(partial(_load_hook, param_name=param_name))
    # Within one forward pass a parameter is dequantized once. The counter goes down even where the pass was cut short,
    # as gradient checkpointing does: else everything dequantized later would be kept.
    module.register_forward_pre_hook(_enable_parametrization_cache)
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


def _enable_parametrization_cache(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    del module, inputs
    parametrize._cache_enabled += 1  # pyright: ignore[reportPrivateUsage]


def _disable_parametrization_cache(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    del module, inputs, output
    # An earlier hook may have failed before the counter went up.
    parametrize._cache_enabled = max(0, parametrize._cache_enabled - 1)  # pyright: ignore[reportPrivateUsage]
    if not parametrize._cache_enabled:  # pyright: ignore[reportPrivateUsage]
        parametrize._cache = {}  # pyright: ignore[reportPrivateUsage]


def _state_of(module: Any, name: str) -> Bnb4bitParametrization | None:
    found = module.parametrizations[name] if parametrize.is_parametrized(module, name) else ()
    return next((each for each in found if isinstance(each, Bnb4bitParametrization)), None)


def _parametrized_state_dict_post_hook(
    module: torch.nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    *,
    param_name: str = "weight",
    **kwargs: Any,
) -> None:
    """Give the packed codes the parameter's own name, and their state keys beside it."""
    del local_metadata, kwargs
    ours = _state_of(module, param_name)
    original = f"{prefix}parametrizations.{param_name}.original"
    if ours is None or original not in state_dict:
        return
    state_dict[f"{prefix}{param_name}"] = state_dict.pop(original)
    for key, value in ours.quant_state.as_dict(packed=True).items():
        state_dict[f"{prefix}{param_name}.{key}"] = value


def _load_hook(
    module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any, param_name: str = "weight"
) -> None:
    """Take the parameter and its state keys where a state dict has them."""
    ours = _state_of(module, param_name)
    key = f"{prefix}{param_name}"
    stats = {name: value for name, value in state_dict.items() if name.startswith(f"{key}.")}
    if ours is None or key not in state_dict or not stats:
        return
    parameter: Any = module.get_parameter(f"parametrizations.{param_name}.original")
    packed = state_dict[key]
    errors: list[str] = rest[-1]
    taken: Any = parameter.data
    try:
        state = QuantState.from_dict(stats, parameter.device)
    except ValueError as error:
        errors.append(f"{key}: {error}")
    else:
        if state.shape != ours.quant_state.shape or packed.shape != parameter.shape:
            errors.append(f"{key}: a 4-bit weight of shape {state.shape}, expected {ours.quant_state.shape}")
        else:
            ours.quant_state = parameter.quant_state = state
            taken = packed
    for name in (*stats, key):
        del state_dict[name]
    state_dict[f"{prefix}parametrizations.{param_name}.original"] = taken
