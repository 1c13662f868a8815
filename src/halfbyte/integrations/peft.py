"""What halfbyte adds to peft: RandLoRA merges what its forward pass applies, LoftQ runs without a GPU.

Importing this module changes nothing; ``libraries.watch`` calls the functions when peft's modules are loaded.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["extend_loftq", "extend_randlora"]


def extend_randlora() -> None:
    """Give the quantized layers the dense layer's delta: theirs multiplies its two factors in the wrong order."""
    from peft.tuners.randlora import bnb, layer

    for name in ("Linear8bitLt", "Linear4bit"):  # peft defines them where it found bitsandbytes
        quantized: Any = getattr(bnb, name, None)
        if quantized is not None:
            quantized.get_delta_weight = layer.Linear.get_delta_weight


def extend_loftq() -> None:
    """Let LoftQ's initialisation compute on the CPU where there is no GPU: it asks for "cuda" by name."""
    module = sys.modules["peft.utils.loftq_utils"]
    for name in ("loftq_init", "_loftq_init_new"):
        setattr(module, name, _without_gpu(getattr(module, name)))


def _without_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def anywhere(*args: Any, **kwargs: Any) -> Any:
        if torch.cuda.is_available() or torch.xpu.is_available():
            return function(*args, **kwargs)
        with _CpuForCuda():
            return function(*args, **kwargs)

    return anywhere


class _CpuForCuda(TorchFunctionMode):
    """While it lasts, a tensor that is sent to "cuda" goes to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            args = tuple("cpu" if isinstance(value, str) and value == "cuda" else value for value in args)
            if kwargs.get("device") == "cuda":
                kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)
