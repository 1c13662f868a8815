"""peft's LoRA on parameters (``target_parameters``) for experts in 4 bits: beside their product, not inside it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from halfbyte.nn.experts_4bit import Experts4bit
from halfbyte.nn.experts_low_rank import low_rank

__all__ = ["extend"]


def _experts(wrapper: Any) -> Experts4bit | None:
    """The 4-bit experts whose parameter is adapted, if it is one of those."""
    base = wrapper.get_base_layer()
    return base if isinstance(base, Experts4bit) and wrapper.parameter_name in base.four_bit_names else None


def _factors(wrapper: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """``(experts, rank, in)`` and ``(experts, out, rank)``, cut out of peft's two linear layers as peft does."""
    down, up = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    down = down.reshape(wrapper.num_experts, -1, down.shape[-1])
    return down, up.reshape(up.shape[0], -1, wrapper.num_experts).permute(2, 0, 1)


_wrapper: Any = ParamWrapper
_features, _activate, _delta = _wrapper._get_in_out_features, _wrapper._activate_lora, _wrapper.get_delta_weight
_merge, _unmerge = _wrapper.merge, _wrapper.unmerge


def _get_in_out_features(self: Any, module: torch.nn.Module) -> Any:
    experts = _experts(self)
    if experts is None:
        return _features(self, module)
    # Packed codes have another shape: peft would take them for one matrix.
    self.num_experts, first, second = experts.shape_of(self.parameter_name)
    self._param_ndim = 3
    return first, second


@contextmanager
def _activate_lora(self: Any, active_adapters: Any) -> Generator[None]:
    experts = _experts(self)
    if experts is None:
        with _activate(self, active_adapters):
            yield
        return
    name = self.parameter_name
    before = experts.low_rank.get(name, [])
    added = [
        partial(_add, *_factors(self, adapter), self.scaling[adapter])
        for adapter in active_adapters or ()
        if adapter in self.lora_A
    ]
    experts.low_rank[name] = [*before, *added]
    try:
        yield
    finally:
        experts.low_rank[name] = before


def _get_delta_weight(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
    experts = _experts(self)
    if experts is None:
        return _delta(self, adapter_name, *args, **kwargs)
    down, up = _factors(self, adapter_name)
    product = (up.float() @ down.float()) * self.scaling[adapter_name]
    return product.transpose(1, 2) if experts.is_transposed else product


def _merge_4bit(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    experts = _experts(self)
    if experts is None:
        _merge(self, safe_merge=safe_merge, adapter_names=adapter_names)
        return
    for adapter in check_adapters_to_merge(self, adapter_names) or ():
        if adapter in self.lora_A:
            experts.add_to(self.parameter_name, _get_delta_weight(self, adapter))
            self.merged_adapters.append(adapter)


def _unmerge_4bit(self: Any) -> None:
    experts = _experts(self)
    if experts is None or not self.merged:
        _unmerge(self)
        return
    while self.merged_adapters:
        adapter = self.merged_adapters.pop()
        if adapter in self.lora_A:
            experts.add_to(self.parameter_name, -_get_delta_weight(self, adapter))


def _add(down: Tensor, up: Tensor, scaling: float, x: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    return low_rank(x, order, ends, down, up, scaling)


def extend() -> None:
    """Teach peft's wrapper of parameters about 4-bit experts; everything else stays as it is."""
    _wrapper._get_in_out_features = _get_in_out_features
    _wrapper._activate_lora = _activate_lora
    _wrapper.get_delta_weight = _get_delta_weight
    _wrapper.merge = _merge_4bit
    _wrapper.unmerge = _unmerge_4bit
