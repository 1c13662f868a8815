"""Steps that are like the last one: the calls are kept, and only numbers and addresses of gradients are looked at.

For hundreds of parameters, finding out what goes together costs the host more than the step costs a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.optim import sharding
from halfbyte.optim.buckets import Bucket

if TYPE_CHECKING:
    from halfbyte.optim.base import Optimizer8bit

__all__ = ["Plan", "Source"]

Source = tuple[int, int, dict[str, Any]]
"""Place of a group, of a parameter in it, and the group: what a parameter's settings are looked up by."""


@dataclass
class _Item:
    """One parameter as it was when the plan was made."""

    p: Tensor
    state: dict[str, Any]
    state1: Tensor
    address: int
    numel: int
    grad: torch.dtype
    grad_address: int
    bucket: Bucket


class Plan:
    """What one step did, for the next one to repeat.

    Args:
        optimizer: Whose step it was.
        assigned: Each parameter in order, with its bucket and where its settings are looked up.
    """

    def __init__(self, optimizer: Optimizer8bit, assigned: Iterable[tuple[Tensor, Bucket, Source]]) -> None:
        self._items: list[_Item] = []
        self._sources: dict[int, dict[tuple[int, int], Source]] = {}
        self._buckets: dict[int, Bucket] = {}
        self._members: dict[int, list[Tensor]] = {}
        self._fingerprint = optimizer.fingerprint()
        for p, bucket, source in assigned:
            assert p.grad is not None
            state = optimizer.state[p]
            self._buckets[id(bucket)] = bucket
            known = self._sources.setdefault(id(bucket), {})
            # Parameters of a group differ in their overrides alone.
            known.setdefault((source[0], id(optimizer.mng.pid2config.get(id(p)))), source)
            self._items.append(
                _Item(
                    p,
                    state,
                    state["state1"],
                    p.data_ptr(),
                    p.numel(),
                    p.grad.dtype,
                    p.grad.data_ptr(),
                    bucket,
                )
            )
            self._members.setdefault(id(bucket), []).append(p)
        self._forget()

    @staticmethod
    def possible(optimizer: Optimizer8bit, assigned: Iterable[tuple[Tensor, Bucket, Source]]) -> bool:
        """Whether a later step may be like this one: nothing in it hangs on the values of a single parameter."""
        if optimizer.options.percentile_clipping < 100 or optimizer.options.capturable:
            return False
        return all(
            bucket.repeats and not sharding.is_sharded(p) and id(p) in bucket.owners for p, bucket, _ in assigned
        )

    def repeat(self, optimizer: Optimizer8bit) -> bool:
        """Take a step as planned; False, and nothing done, if something is not as it was."""
        if optimizer.fingerprint() != self._fingerprint or not self._unchanged(optimizer):
            return False
        numbers = self._settings(optimizer)
        if numbers is None:
            return False
        for item in self._items:
            item.state["step"] = item.bucket.step_number + 1
        for bucket, settings in numbers:
            bucket.step_number += 1
            bucket.settings, bucket.seed = settings, optimizer.seed_of(bucket.step_number)
            if not bucket.prepared:
                bucket.grads = [p.grad.detach() for p in self._members[id(bucket)] if p.grad is not None]
                bucket.prepare()
            bucket.step(optimizer.hyper_of(bucket))
        self._forget()
        return True

    def _forget(self) -> None:
        """Keep no gradient alive."""
        for bucket in self._buckets.values():
            bucket.grads = []

    def _unchanged(self, optimizer: Optimizer8bit) -> bool:
        """Whether these are the parameters and states that were planned; notes where gradients are now."""
        rest, states = iter(self._items), optimizer.state
        for group in optimizer.param_groups:
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                item = next(rest, None)
                if (
                    item is None
                    or item.p is not p
                    or grad.dtype is not item.grad
                    or grad.layout is not torch.strided
                    or grad.numel() != item.numel
                    or not grad.is_contiguous()
                    or p.data_ptr() != item.address
                    or states.get(p) is not item.state
                    or item.state["state1"] is not item.state1
                    or item.state["step"] != item.bucket.step_number
                ):
                    return False
                if grad.data_ptr() != item.grad_address:
                    item.grad_address = grad.data_ptr()
                    item.bucket.prepared = None
        return next(rest, None) is None

    def _settings(self, optimizer: Optimizer8bit) -> list[tuple[Bucket, dict[str, Any]]] | None:
        """Each bucket's numbers for the step that comes; None if its parameters do not share them any more."""
        found: list[tuple[Bucket, dict[str, Any]]] = []
        for key, bucket in self._buckets.items():
            step = bucket.step_number + 1
            every = [optimizer.settings_at(source, step) for source in self._sources[key].values()]
            if any(not _alike(one, every[0]) for one in every[1:]):
                return None
            found.append((bucket, every[0]))
        return found


def _alike(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(
        left[key] is right[key] or (not isinstance(left[key], Tensor) and left[key] == right[key]) for key in left
    )
