"""Which keys of a checkpoint belong to one 4-bit weight."""

from __future__ import annotations

from collections.abc import Iterable

from halfbyte.quant_state import PACKED_PREFIX

__all__ = ["STATE_INFIX", "group_by_weight", "weight_of"]

STATE_INFIX = f".quant_state.{PACKED_PREFIX}"
"""Between a weight's key and its quant_type: ``fc.weight.quant_state.bitsandbytes__nf4``."""

_TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def weight_of(key: str) -> str | None:
    """The weight that ``key`` describes; None where it describes none.

    >>> weight_of("fc.weight.absmax"), weight_of("fc.weight.quant_state.bitsandbytes__nf4"), weight_of("fc.weight")
    ('fc.weight', 'fc.weight', None)
    """
    if STATE_INFIX in key:
        return key.rsplit(STATE_INFIX, 1)[0]
    weight, _, last = key.rpartition(".")
    return weight if weight and last in _TENSORS else None


def group_by_weight(keys: Iterable[str]) -> dict[str, list[str]]:
    """4-bit weights, each with the keys that stand under its own, foreign ones included, in their order.

    >>> group_by_weight(["fc.bias", "fc.weight", "fc.weight.absmax", "fc.weight.colour"])
    {'fc.weight': ['fc.weight.absmax', 'fc.weight.colour']}
    """
    keys = list(keys)
    found: dict[str, list[str]] = {weight: [] for weight in map(weight_of, keys) if weight is not None}
    for key in keys:
        weight = weight_of(key) or key.rpartition(".")[0]
        if weight in found:
            found[weight].append(key)
    return found
