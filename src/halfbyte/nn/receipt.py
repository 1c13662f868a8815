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
from halfbyte.nn.left_alone import Reasons

__all__ = ["WARN_BELOW", "Receipt", "Skipped", "count", "receipt"]

WARN_BELOW = 0.5
"""Share of quantized weights below which the receipt warns."""


@dataclass(frozen=True)
class Skipped:
    """Weights that were left alone: their name (``*`` for layer numbers), how many of them, weights, bytes, why."""

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
        by_reason: dict[str, list[Skipped]] = {}
        for entry in self.skipped:
            by_reason.setdefault(entry.reason, []).append(entry)
        for reason, entries in by_reason.items():
            first = entries[0].name + (f" and {len(entries) - 1} more names" if len(entries) > 1 else "")
            weights, nbytes = sum(entry.weights for entry in entries), sum(entry.nbytes for entry in entries)
            lines += [f"    {first}: {_count(weights)} weights, {_size(nbytes)}", f"      {reason}"]
        return "\n".join(lines)


@dataclass
class _Tally:
    dtype: torch.dtype
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
    (1.0, 6.27)
    """
    found = count(model)
    if show:
        print(found)
    if warn and found.weights and found.share < WARN_BELOW:
        largest = found.skipped[0]
        warnings.warn(
            f"only {found.share:.1%} of the weights are quantized; the largest part left alone is {largest.name} "
            f"({largest.reason})",
            stacklevel=2,
        )
    return found


def count(model: torch.nn.Module) -> Receipt:
    """The receipt of ``model``, without a word."""
    tally = _Tally(_activation_dtype(model))
    reasons = Reasons(model)
    for name, module, parameter in _parameters(model):
        if _is_quantized(parameter):
            _count_quantized(tally, module, parameter)
        else:
            _count_skipped(tally, name, parameter, reasons.why(name, module, parameter))
    skipped = sorted(tally.skipped.items(), key=lambda item: -item[1][1])
    return Receipt(
        weights=tally.weights,
        quantized_weights=tally.quantized_weights,
        nbytes=tally.nbytes,
        quantized_nbytes=tally.quantized_nbytes,
        original_nbytes=tally.original_nbytes,
        formats=dict(sorted(tally.formats.items(), key=lambda item: -item[1])),
        compute_dtypes=tuple(sorted(tally.compute_dtypes)),
        skipped=tuple(Skipped(name, n[0], n[1], n[2], reason) for (name, reason), n in skipped),
    )


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{module_name}.{parameter_name}".lstrip("."), module, parameter


def _is_quantized(parameter: Any) -> bool:
    # By name, as transformers and peft do: sharding wrappers keep the class's name, not always its identity.
    kind = type(parameter).__name__
    if kind == "Int8Params":
        return parameter.dtype == torch.int8
    return getattr(parameter, "quant_state", None) is not None  # a Params4bit, or one of nn.parametrize


def _activation_dtype(model: torch.nn.Module) -> torch.dtype:
    """dtype of the weights that are not quantized, which is what reaches the quantized layers."""
    dtypes = (p.dtype for p in model.parameters() if not _is_quantized(p) and p.is_floating_point())
    return next(dtypes, torch.float32)


def _count_quantized(tally: _Tally, module: torch.nn.Module, parameter: Any) -> None:
    if type(parameter).__name__ == "Int8Params":
        scales = getattr(parameter, "SCB", None)
        scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
        weights, itemsize, name = parameter.numel(), tally.dtype.itemsize, "int8"
        parts = [parameter] if scales is None else [parameter, scales]
        # Its products are int8; what surrounds them has the dtype of the activations.
        dtype, chosen = tally.dtype, ""
    else:
        state = parameter.quant_state
        weights, itemsize = math.prod(state.shape), state.dtype.itemsize
        name = f"{state.quant_type}, double quant" if state.nested else str(state.quant_type)
        parts = [parameter, *state.tensors()]
        dtype, chosen = _compute_dtype(module, parameter, tally.dtype)
    nbytes = sum(part.numel() * part.element_size() for part in parts)
    tally.formats[name] = tally.formats.get(name, 0) + weights
    tally.quantized_weights += weights
    tally.quantized_nbytes += nbytes
    tally.weights += weights
    tally.nbytes += nbytes
    tally.original_nbytes += weights * itemsize
    if not isinstance(module, torch.nn.Embedding):  # a look-up multiplies nothing
        tally.compute_dtypes.add(str(dtype).removeprefix("torch.") + chosen)


def _compute_dtype(module: torch.nn.Module, parameter: Any, activations: torch.dtype) -> tuple[torch.dtype, str]:
    given = getattr(module, "compute_dtype", None)
    if given is not None:
        return given, ""
    if activations in (torch.bfloat16, torch.float16):
        return activations, " (the activations' own)"
    return default_compute_dtype(parameter.device), " (chosen by halfbyte)"


def _count_skipped(tally: _Tally, name: str, parameter: torch.nn.Parameter, reason: str) -> None:
    nbytes = parameter.numel() * parameter.element_size()
    tally.weights += parameter.numel()
    tally.nbytes += nbytes
    tally.original_nbytes += nbytes
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    entry = tally.skipped.setdefault((pattern, reason), [0, 0, 0])
    for index, number in enumerate((1, parameter.numel(), nbytes)):
        entry[index] += number


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
