"""Why a weight was not quantized: the sentences of the receipt."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from halfbyte.nn.experts_4bit import why_not_experts

__all__ = ["Reasons", "leave_alone"]


def leave_alone(module: torch.nn.Module, reason: str) -> None:
    """Note why the parameters of ``module`` itself stay as they are, for the receipt."""
    vars(module)["left_alone"] = reason


class Reasons:
    """Tells why weights of one model were left alone.

    Args:
        model: Any module; for one that transformers quantized, its quantizer's lists are used.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        quantizer = getattr(model, "hf_quantizer", None)
        asked = getattr(getattr(quantizer, "quantization_config", None), "llm_int8_skip_modules", None)
        self._asked: list[str] = list(asked or ())
        self._kept: list[str] = list(getattr(quantizer, "modules_to_not_convert", None) or ())
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)

    def why(self, name: str, module: torch.nn.Module, parameter: torch.nn.Parameter) -> str:
        """One sentence.

        Args:
            name: Full name of the parameter.
            module: Its owner.
            parameter: The weight.

        >>> linear = torch.nn.Linear(4, 4)
        >>> Reasons(linear).why("bias", linear, linear.bias)
        'a vector (bias or norm): quantizing saves nothing'
        """
        owner, _, own = name.rpartition(".")
        kind = type(module).__name__
        others = [other for other in self._names.get(id(parameter), ()) if other != name]
        if others:
            return f"shared (tied) with {', '.join(others)}: quantizing would change both"
        if parameter.dim() < 2:
            return "a vector (bias or norm): quantizing saves nothing"
        if isinstance(module, torch.nn.Embedding):
            return "an embedding table: BitsAndBytesConfig(quantize_embeddings=True) quantizes it"
        if any(part.startswith(("lora_", "vera_", "randlora_")) for part in name.split(".")):
            return "an adapter's weight, which is trained"
        if _named(owner, self._asked):
            return "named in llm_int8_skip_modules"
        if _named(owner, self._kept):
            return "kept by transformers: an output head, a tied weight or a module that stays in fp32"
        if parameter.dim() > 2:
            return vars(module).get("left_alone") or _many_dimensions(f"{parameter.dim()}-D", own, module)
        if type(module) is torch.nn.Linear:
            return "a linear layer that was not converted"
        if isinstance(module, torch.nn.Linear):
            return f"a {kind}: only plain torch.nn.Linear is converted"
        return f"a parameter of {kind}, which is no linear layer"


def _many_dimensions(how_many: str, own: str, module: torch.nn.Module) -> str:
    if hasattr(module, "four_bit_names"):
        return "experts that were not quantized when they were saved"
    reason = why_not_experts(module)
    if reason is None:
        return "fused experts, which only transformers' load_in_4bit quantizes"
    return reason or f"a {how_many} parameter ({own} of {type(module).__name__}): neither linear nor known experts"


def _named(module: str, patterns: Iterable[str]) -> bool:
    """Whether one of transformers' skip patterns (a prefix or regular expression, or an ending) names the module."""
    return any(re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(key) for key in patterns)
