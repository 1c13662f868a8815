"""Steps that are like the last one: the calls are kept, and only numbers and addresses are looked at.

For hundreds of parameters, finding out what goes together costs the host more than the step costs a GPU. A plan knows
states by their addresses and keeps none of them, nor a gradient, nor a parameter's memory: what a user moves elsewhere
is freed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import starmap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.optim import sharding
from halfbyte.optim import state as storage
from halfbyte.optim.buckets import Bucket
from halfbyte.optim.grouping import Assigned, Place

if TYPE_CHECKING:
    from halfbyte.optim.base import Optimizer8bit

__all__ = ["Plan"]


class _Share:
    """One bucket's share in a plan: where its tensors and settings are found again."""

    def __init__(self) -> None:
        self.members: list[int] = []
        self.states: list[dict[str, Any]] = []
        self.places: dict[tuple[int, int], Place] = {}


class Plan:
    """What one step did, for the next one to repeat.

    Args:
        optimizer: Whose step it was.
        assigned: Each parameter in order, with its bucket and where its settings are looked up.
    """

    def __init__(self, optimizer: Optimizer8bit, assigned: Sequence[Assigned]) -> None:
        self._fingerprint = optimizer.fingerprint()
        self._counts, self._every = _members(optimizer)
        self._stepped = [p.grad is not None for p in self._every]
        self._params = [p for p, _, _ in assigned]
        self._states = list(optimizer.state.values())
        self._sizes = list(map(Tensor.numel, self._params))
        self._slots = storage.slots(optimizer.rule)
        names = [f"{kind}{number}" for kind in ("state", "absmax") for number in (1, 2)]
        stepped = [optimizer.state[p] for p in self._params]
        self._entries = [(state, name) for state in stepped for name in names if name in state]
        self._addresses = self._present_addresses()
        self._shares = {bucket: _Share() for _, bucket, _ in assigned}
        for number, (p, bucket, place) in enumerate(assigned):
            share = self._shares[bucket]
            share.members.append(number)
            share.states.append(stepped[number])
            # Parameters of a group differ in their overrides alone.
            share.places.setdefault((place[0], id(optimizer.mng.pid2config.get(id(p)))), place)
        grads = [p.grad for p in self._params if p.grad is not None]
        self._grad_kinds = [grad.dtype for grad in grads]
        self._grad_addresses = list(map(Tensor.data_ptr, grads))
        self._forget()

    def _present_addresses(self) -> list[int]:
        """Of parameters and states: changed by whoever replaces or moves one."""
        return [*map(Tensor.data_ptr, self._params), *map(Tensor.data_ptr, starmap(operator.getitem, self._entries))]

    @staticmethod
    def possible(optimizer: Optimizer8bit, assigned: Sequence[Assigned]) -> bool:
        """Whether a later step may be like this one: nothing in it hangs on the values of a single parameter."""
        if optimizer.options.percentile_clipping < 100 or optimizer.options.capturable:
            return False
        return all(bucket.repeats and not sharding.is_sharded(p) and p.numel() for p, bucket, _ in assigned)

    def repeat(self, optimizer: Optimizer8bit) -> bool:
        """Take a step as planned; False, and nothing done, if something is not as it was."""
        grads = self._grads(optimizer)
        numbers = None if grads is None else self._settings(optimizer)
        if grads is None or numbers is None:
            return False
        addresses = list(map(Tensor.data_ptr, grads))
        moved, self._grad_addresses = addresses != self._grad_addresses, addresses
        for bucket, settings in numbers.items():
            share, step = self._shares[bucket], settings["step"]
            for state in share.states:
                state["step"] = step
            bucket.settings, bucket.seed = settings, optimizer.seed_of(step)
            if moved or not bucket.ready(grads[share.members[0]]):
                self._fill(bucket, share, grads)
                bucket.prepare()
            bucket.step(optimizer.hyper_of(bucket))
        self._forget()
        return True

    def _fill(self, bucket: Bucket, share: _Share, grads: Sequence[Tensor]) -> None:
        bucket.params = [self._params[member].detach() for member in share.members]
        bucket.grads = [grads[member].detach() for member in share.members]
        bucket.states = self._entries_of("state", share)
        bucket.absmax = self._entries_of("absmax", share) if bucket.blocksize else []

    def _entries_of(self, kind: str, share: _Share) -> list[Tensor]:
        keys = [(f"{kind}{slot.number}", slot) for slot in self._slots]
        return [slot.of(state[key]) for state in share.states for key, slot in keys]

    def _forget(self) -> None:
        for bucket in self._shares:
            bucket.params, bucket.grads, bucket.states, bucket.absmax = [], [], [], []

    def _grads(self, optimizer: Optimizer8bit) -> list[Tensor] | None:
        """Gradients of the planned parameters; None if these or their states are not as they were.

        For hundreds of parameters, so it asks each question of all of them in one go.
        """
        counts, every = _members(optimizer)
        if counts != self._counts or any(map(operator.is_not, every, self._every)):
            return None
        found = [p.grad for p in every]
        if [grad is not None for grad in found] != self._stepped:
            return None
        grads = [grad for grad in found if grad is not None]
        same = (
            optimizer.fingerprint() == self._fingerprint
            and len(optimizer.state) == len(self._states)
            and not any(map(operator.is_not, optimizer.state.values(), self._states))
            and all({state["step"] for state in s.states} == {b.settings["step"]} for b, s in self._shares.items())
            and [grad.dtype for grad in grads] == self._grad_kinds
            and {grad.layout for grad in grads} == {torch.strided}
            and all(map(Tensor.is_contiguous, grads))
            and list(map(Tensor.numel, grads)) == self._sizes
            and self._present_addresses() == self._addresses
        )
        return grads if same else None

    def _settings(self, optimizer: Optimizer8bit) -> dict[Bucket, dict[str, Any]] | None:
        """Each bucket's numbers for the step that comes; None if its parameters do not share them any more."""
        found: dict[Bucket, dict[str, Any]] = {}
        for bucket, share in self._shares.items():
            step = bucket.settings["step"] + 1
            first, *others = [optimizer.settings_at(place, step) for place in share.places.values()]
            if not all(_alike(other, first) for other in others):
                return None
            found[bucket] = first
        return found


def _members(optimizer: Optimizer8bit) -> tuple[list[int], list[Tensor]]:
    """How many parameters each group has, and all of them in order."""
    groups = [group["params"] for group in optimizer.param_groups]
    return list(map(len, groups)), [p for group in groups for p in group]


def _alike(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(
        left[key] is right[key] or (not isinstance(left[key], Tensor) and left[key] == right[key]) for key in left
    )
