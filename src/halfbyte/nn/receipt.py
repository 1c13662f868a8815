"""The receipt: what share of a model is quantized, what was skipped and why, and what that costs in memory."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from halfbyte.nn.compute_dtype import default_compute_dtype

__all__ = ["Receipt", "Skipped", "receipt"]

WARN_BELOW = 0.5
"""Share of quantized weights below which the receipt warns."""


@dataclass(frozen=True)
class Skipped:
    """Weights that were left alone: a module name (``*`` for repeated ones), how many of them, weights, bytes, why."""

    name: str
    modules: int
    weights: int
    nbytes: int
    reason: str


@dataclass(frozen=True)
class Receipt:
    """What :func:`receipt` found.

    Attributes:
        weights: All weights of the model.
        quantized_weights: Those that are quantized.
        nbytes: Bytes all weights take now, scales included.
        quantized_nbytes: Bytes of the quantized ones.
        original_nbytes: Bytes the model would take in its original dtype.
        formats: Format -> weights in it, such as ``{"nf4, double quant": 106_168_320}``.
        compute_dtypes: Names of the dtypes that products are computed in.
        skipped: What was left alone, largest first.
    """

    weights: int
    quantized_weights: int
    nbytes: int
    quantized_nbytes: int
    original_nbytes: int
    formats: dict[str, int]
    compute_dtypes: tuple[str, ...]
    skipped: tuple[Skipped, ...]

    @property
    def share(self) -> float:
        """Quantized weights over all weights, 0 to 1."""
        return self.quantized_weights / self.weights if self.weights else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over the whole model, scales and unquantized weights included."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    def line(self) -> str:
        """One line for a log."""
        formats = " + ".join(self.formats) or "nothing"
        return (
            f"{self.share:.1%} of {_count(self.weights)} weights in {formats}; {self.bits_per_weight:.2f} bits per "
            f"weight; {_size(self.original_nbytes)} -> {_size(self.nbytes)}; "
            f"computes in {', '.join(self.compute_dtypes) or 'the model dtype'}"
        )

    def __str__(self) -> str:
        rows = [
            ("quantized", f"{_count(self.quantized_weights)} of {_count(self.weights)} weights ({self.share:.1%})"),
            *((f"  {name}", f"{_count(weights)} weights") for name, weights in self.formats.items()),
            ("bits per weight", f"{self.bits_per_weight:.2f} all told"),
            ("memory", f"{_size(self.original_nbytes)} before, {_size(self.nbytes)} now"),
            ("computes in", ", ".join(self.compute_dtypes) or "the model dtype"),
        ]
        lines = ["halfbyte receipt", *(f"  {name:<16} {value}" for name, value in rows)]
        if self.skipped:
            lines.append("  left alone")
            for entry in self.skipped:
                many = f" x{entry.modules}" if entry.modules > 1 else ""
                lines.append(f"    {entry.name}{many}: {_count(entry.weights)} weights, {_size(entry.nbytes)}")
                lines.append(f"      {entry.reason}")
        return "\n".join(lines)


@dataclass
class _Tally:
    quantized_weights: int = 0
    quantized_nbytes: int = 0
    weights: int = 0
    nbytes: int = 0
    original_nbytes: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    compute_dtypes: set[str] = field(default_factory=set)
    skipped: dict[tuple[str, str], list[int]] = field(default_factory=dict)


def receipt(model: torch.nn.Module, *, show: bool = True, warn: bool = True) -> Receipt:
    """Count what is quantized in ``model``; print it unless ``show`` is False.

    Warns when less than half of the weights are quantized, unless ``warn`` is False.

    >>> from halfbyte.nn import LinearNF4
    >>> r = receipt(torch.nn.Sequential(LinearNF4(64, 64, bias=False).to("cpu")), show=False)
    >>> r.share, round(r.bits_per_weight, 2)
    (1.0, 6.65)
    """
    tally = _Tally()
    kept: set[str] = set(getattr(getattr(model, "hf_quantizer", None), "modules_to_not_convert", None) or ())
    tied = _tied_names(model)
    for name, module, parameter in _parameters(model):
        if _is_quantized(parameter):
            _count_quantized(tally, module, parameter)
        else:
            _count_skipped(tally, name, module, parameter, kept, tied)
    found = Receipt(
        weights=tally.weights,
        quantized_weights=tally.quantized_weights,
        nbytes=tally.nbytes,
        quantized_nbytes=tally.quantized_nbytes,
        original_nbytes=tally.original_nbytes,
        formats=dict(sorted(tally.formats.items(), key=lambda item: -item[1])),
        compute_dtypes=tuple(sorted(tally.compute_dtypes)),
        skipped=tuple(
            Skipped(name, modules, weights, nbytes, reason)
            for (name, reason), (modules, weights, nbytes) in sorted(
                tally.skipped.items(), key=lambda item: -item[1][1]
            )
        ),
    )
    if show:
        print(found)
    if warn and found.weights and found.share < WARN_BELOW:
        largest = found.skipped[0] if found.skipped else None
        why = f"; the largest part left alone is {largest.name} ({largest.reason})" if largest else ""
        warnings.warn(f"only {found.share:.1%} of the weights are quantized{why}", stacklevel=2)
    return found


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{module_name}.{parameter_name}".lstrip("."), module, parameter


def _tied_names(model: torch.nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _is_quantized(parameter: Any) -> bool:
    # By name, as transformers and peft do: sharding wrappers keep the class's name, not always its identity.
    kind = type(parameter).__name__
    return kind == "Params4bit" and getattr(parameter, "quant_state", None) is not None


def _count_quantized(tally: _Tally, module: torch.nn.Module, parameter: Any) -> None:
    state = parameter.quant_state
    weights = math.prod(state.shape)
    scales = [tensor for tensor in state.tensors() if tensor is not state.code]
    nbytes = sum(t.numel() * t.element_size() for t in (parameter, state.code, *scales))
    name = f"{state.quant_type}, double quant" if state.nested else str(state.quant_type)
    tally.formats[name] = tally.formats.get(name, 0) + weights
    tally.quantized_weights += weights
    tally.quantized_nbytes += nbytes
    tally.weights += weights
    tally.nbytes += nbytes
    tally.original_nbytes += weights * state.dtype.itemsize
    dtype = getattr(module, "compute_dtype", None) or default_compute_dtype(parameter.device)
    chosen = "" if getattr(module, "compute_dtype", None) else " (chosen by halfbyte)"
    tally.compute_dtypes.add(str(dtype).removeprefix("torch.") + chosen)


def _count_skipped(
    tally: _Tally,
    name: str,
    module: torch.nn.Module,
    parameter: torch.nn.Parameter,
    not_converted: set[str],
    tied: dict[int, list[str]],
) -> None:
    nbytes = parameter.numel() * parameter.element_size()
    tally.weights += parameter.numel()
    tally.nbytes += nbytes
    tally.original_nbytes += nbytes
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    reason = _why(name, module, parameter, not_converted, tied[id(parameter)])
    entry = tally.skipped.setdefault((pattern, reason), [0, 0, 0])
    entry[0] += 1
    entry[1] += parameter.numel()
    entry[2] += nbytes


def _why(
    name: str, module: torch.nn.Module, parameter: torch.nn.Parameter, not_converted: set[str], names: list[str]
) -> str:
    owner, _, own = name.rpartition(".")
    others = [other for other in names if other != name]
    if others:
        return f"tied to {', '.join(others)}: quantizing would change both"
    if parameter.dim() < 2:
        return "a vector (bias or norm): quantizing saves nothing"
    if isinstance(module, torch.nn.Embedding):
        return "an embedding table: looked up, not multiplied"
    if any(owner == skip or owner.endswith(f".{skip}") or owner.startswith(f"{skip}.") for skip in not_converted):
        return "kept by the configuration (llm_int8_skip_modules, or transformers' default for output heads)"
    if parameter.dim() > 2:
        return f"a {parameter.dim()}-D parameter ({own} of {type(module).__name__}): only linear layers are quantized"
    if isinstance(module, torch.nn.Linear):
        return "a linear layer that was not converted"
    return f"a parameter of {type(module).__name__}, which is no linear layer"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"
