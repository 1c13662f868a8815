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
    for module in ("peft.utils.loftq_utils", "peft.tuners.lora.layer"):
        for name in ("loftq_init", "_loftq_init_new"):
            function = getattr(sys.modules.get(module), name, None)
            if function is not None and not isinstance(function, _Anywhere):
                setattr(sys.modules[module], name, _Anywhere(function))


class _Anywhere:
    """A function that is called with the CPU in the place of a GPU that is not there."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.cuda.is_available() or torch.xpu.is_available():
            return self._function(*args, **kwargs)
        with _CpuForCuda():
            return self._function(*args, **kwargs)


class _CpuForCuda(TorchFunctionMode):
    """While it lasts, a tensor that is sent to "cuda" goes to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            args = (args[0], *("cpu" if str(value) == "cuda" else value for value in args[1:]))
            if str(kwargs.get("device")) == "cuda":
                kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)
