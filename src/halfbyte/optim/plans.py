"""Steps that are like the last one: the calls are kept, and only numbers and addresses of gradients are looked at.

For hundreds of parameters, finding out what goes together costs the host more than the step costs a GPU.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
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


class Plan:
    """What one step did, for the next one to repeat.

    Args:
        optimizer: Whose step it was.
        assigned: Each parameter in order, with its bucket and where its settings are looked up.
    """

    def __init__(self, optimizer: Optimizer8bit, assigned: Sequence[tuple[Tensor, Bucket, Source]]) -> None:
        self._fingerprint = optimizer.fingerprint()
        self._params = [p for p, _, _ in assigned]
        self._owners = [bucket for _, bucket, _ in assigned]
        self._addresses = list(map(Tensor.data_ptr, self._params))
        self._sizes = list(map(Tensor.numel, self._params))
        self._states = [optimizer.state[p] for p in self._params]
        self._codes = [state["state1"] for state in self._states]
        self._all_states = list(map(id, optimizer.state.values()))
        self._buckets = list({id(bucket): bucket for bucket in self._owners}.values())
        self._members: dict[int, list[int]] = {id(bucket): [] for bucket in self._buckets}
        self._sources: dict[int, dict[tuple[int, int], Source]] = {id(bucket): {} for bucket in self._buckets}
        for place, (p, bucket, source) in enumerate(assigned):
            self._members[id(bucket)].append(place)
            # Parameters of a group differ in their overrides alone.
            key = (source[0], id(optimizer.mng.pid2config.get(id(p))))
            self._sources[id(bucket)].setdefault(key, source)
        self._note([p.grad for p in self._params if p.grad is not None])
        self._forget()

    def _note(self, grads: list[Tensor]) -> None:
        self._grad_kinds = [grad.dtype for grad in grads]
        self._grad_addresses = [grad.data_ptr() for grad in grads]

    @staticmethod
    def possible(optimizer: Optimizer8bit, assigned: Sequence[tuple[Tensor, Bucket, Source]]) -> bool:
        """Whether a later step may be like this one: nothing in it hangs on the values of a single parameter."""
        if optimizer.options.percentile_clipping < 100 or optimizer.options.capturable:
            return False
        return all(
            bucket.repeats and not sharding.is_sharded(p) and id(p) in bucket.owners for p, bucket, _ in assigned
        )

    def repeat(self, optimizer: Optimizer8bit) -> bool:
        """Take a step as planned; False, and nothing done, if something is not as it was."""
        grads = self._grads(optimizer)
        numbers = None if grads is None else self._settings(optimizer)
        if grads is None or numbers is None:
            return False
        for state, bucket in zip(self._states, self._owners, strict=True):
            state["step"] = bucket.step_number + 1
        addresses = [grad.data_ptr() for grad in grads]
        moved, self._grad_addresses = addresses != self._grad_addresses, addresses
        for bucket, settings in numbers:
            bucket.step_number += 1
            bucket.settings, bucket.seed = settings, optimizer.seed_of(bucket.step_number)
            if moved or bucket.prepared is None:
                bucket.grads = [grads[place].detach() for place in self._members[id(bucket)]]
                bucket.prepare()
            bucket.step(optimizer.hyper_of(bucket))
        self._forget()
        return True

    def _forget(self) -> None:
        """Keep no gradient alive."""
        for bucket in self._buckets:
            bucket.grads = []

    def _grads(self, optimizer: Optimizer8bit) -> list[Tensor] | None:
        """Gradients of the planned parameters; None if these or their states are not as they were.

        For hundreds of parameters, so it asks each question of all of them in one go.
        """
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if len(params) != len(self._params) or any(map(operator.is_not, params, self._params)):
            return None
        grads: list[Tensor] = [p.grad for p in params]
        states = self._states
        same = (
            optimizer.fingerprint() == self._fingerprint
            and list(map(id, optimizer.state.values())) == self._all_states
            and not any(map(operator.is_not, [state["state1"] for state in states], self._codes))
            and [state["step"] for state in states] == [bucket.step_number for bucket in self._owners]
            and [grad.dtype for grad in grads] == self._grad_kinds
            and all(grad.layout is torch.strided for grad in grads)
            and all(map(Tensor.is_contiguous, grads))
            and list(map(Tensor.numel, grads)) == self._sizes
            and list(map(Tensor.data_ptr, params)) == self._addresses
        )
        return grads if same else None

    def _settings(self, optimizer: Optimizer8bit) -> list[tuple[Bucket, dict[str, Any]]] | None:
        """Each bucket's numbers for the step that comes; None if its parameters do not share them any more."""
        found: list[tuple[Bucket, dict[str, Any]]] = []
        for bucket in self._buckets:
            step = bucket.step_number + 1
            every = [optimizer.settings_at(source, step) for source in self._sources[id(bucket)].values()]
            if any(not _alike(one, every[0]) for one in every[1:]):
                return None
            found.append((bucket, every[0]))
        return found


def _alike(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(
        left[key] is right[key] or (not isinstance(left[key], Tensor) and left[key] == right[key]) for key in left
    )
