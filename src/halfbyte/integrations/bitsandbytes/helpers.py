"""``bitsandbytes.utils``: the few helpers that other code imports from there."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Collection
from typing import TypeVar

import torch

from halfbyte.nn.outliers import OutlierTracer, find_outlier_dims, outlier_hook
from halfbyte.quant_state import pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "ModuleType",
    "OutlierTracer",
    "execute_and_return",
    "find_outlier_dims",
    "outlier_hook",
    "pack_dict_to_tensor",
    "replace_linear",
    "sync_gpu",
    "unpack_tensor_to_dict",
]

ModuleType = TypeVar("ModuleType", bound=torch.nn.Module)
"""``T`` of ``bitsandbytes.nn.modules``."""

LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
"""Layout of an 8-bit weight -> its number in a checkpoint. Only rows are still written and read."""

INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {
    number: name for name, number in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()
}


def execute_and_return(command_string: str) -> tuple[str, str]:
    """Standard output and error of a command line (split at spaces, no shell)."""
    done = subprocess.run(command_string.split(), capture_output=True, text=True, check=False)
    return done.stdout, done.stderr


def replace_linear(
    model: torch.nn.Module,
    linear_replacement: Callable[[int, int, bool], torch.nn.Module],
    skip_modules: Collection[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> torch.nn.Module:
    """Replace every ``torch.nn.Linear`` below ``model`` by ``linear_replacement(in, out, has_bias)``, in place.

    Args:
        model: Changed and returned.
        linear_replacement: A class such as ``Linear4bit``.
        skip_modules: Names (last part) that stay.
        copy_weights: Hand the old weight and bias over.
        post_processing_function: Name of a method of the replaced module's new layer, called on it.
    """
    for name, module in list(model.named_children()):
        if list(module.children()):
            replace_linear(module, linear_replacement, skip_modules, copy_weights, post_processing_function)
        if not isinstance(module, torch.nn.Linear) or name in skip_modules:
            continue
        layer = linear_replacement(module.in_features, module.out_features, "bias" in dict(module.named_parameters()))
        if copy_weights:
            layer.weight.data = module.weight.data  # pyright: ignore[reportAttributeAccessIssue]
            layer.bias = module.bias
        setattr(model, name, layer)
        if post_processing_function is not None:
            getattr(layer, post_processing_function)()
    return model


def sync_gpu(t: torch.Tensor) -> None:
    """Wait for the device that ``t`` is on."""
    if t.device.type != "cpu":
        torch.accelerator.synchronize(t.device)
