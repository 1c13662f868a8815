"""Optimizer state dicts: bitsandbytes' layout on the way out, every layout it ever wrote on the way in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.optim import paging, sharding
from halfbyte.optim import state as storage

if TYPE_CHECKING:
    from halfbyte.optim.base import Optimizer8bit

__all__ = ["held", "move", "place", "release", "wrapped"]


class _Held:
    """Carries a value through ``torch.optim.Optimizer.load_state_dict``, which would cast a tensor."""

    def __init__(self, value: Any) -> None:
        self.value = value


def wrapped(state_dict: dict[str, Any], optimizer: Optimizer8bit) -> dict[str, Any]:
    """``state_dict`` with the tensors of each parameter below :data:`halfbyte.optim.state.WRAPPER`.

    Maps are copied, so that no two entries share memory (safetensors refuses that). Of a sharded parameter the scales
    are gathered: they are those of the logical tensor, the same in every process.
    """
    order = [p for group in optimizer.param_groups for p in group["params"]]
    found: dict[Any, Any] = {}
    for index, entries in state_dict["state"].items():
        if "state1" not in entries:
            found[index] = entries
            continue
        p = order[index]
        kept = {key: value for key, value in entries.items() if key not in storage.NON_CASTABLE}
        inner = {key: value for key, value in entries.items() if key in storage.NON_CASTABLE}
        for key, value in inner.items():
            if key.startswith("qmap"):
                inner[key] = value.clone()
            elif key.startswith("absmax"):
                inner[key] = sharding.gather_absmax(value, p, storage.blocksize_here(p, value))
        found[index] = {**kept, storage.WRAPPER: inner}
    return {**state_dict, "state": found}


def held(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose states torch leaves alone: wrappers undone, entries carried by :class:`_Held`."""
    found: dict[Any, Any] = {}
    for index, entries in state_dict["state"].items():
        flat = {key: value for key, value in entries.items() if key != storage.WRAPPER}
        flat.update(entries.get(storage.WRAPPER, {}))
        found[index] = _Held(flat)
    return {**state_dict, "state": found}


def release(optimizer: Optimizer8bit, move_to_device: bool) -> None:
    """Turn what :func:`held` made into states: checked, copied, on the parameters' devices."""
    counters: dict[Any, Tensor] = {}
    for p, carrier in list(optimizer.state.items()):
        if not isinstance(carrier, _Held):
            continue
        entries = {key: _copy(value) for key, value in carrier.value.items()}
        optimizer.state[p] = entries
        if "state1" not in entries:
            continue
        storage.check_loaded(entries, p, optimizer.rule)
        blocksize = storage.blocksize_of(p.numel(), entries["absmax1"].shape[-1]) if "absmax1" in entries else 0
        sharding.localize(entries, p, blocksize)
        if move_to_device:
            place(entries, p, optimizer.is_paged)
        _normalize(entries, p, optimizer, counters)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _normalize(entries: dict[str, Any], p: Tensor, optimizer: Optimizer8bit, counters: dict[Any, Tensor]) -> None:
    """The step as this optimizer counts it; maps shared where they are the usual ones; contiguous tensors."""
    step, capturable = entries.get("step", 0), optimizer.options.capturable
    if capturable:
        # Parameters that have taken as many steps go on counting with one tensor.
        entries["step"] = counters.setdefault(
            (p.device, float(step)), torch.as_tensor(step, dtype=torch.float32).to(p.device).clone()
        )
    else:
        entries["step"] = int(step)
    for key in ("qmap1", "qmap2"):
        code = entries.get(key)
        if code is None:
            continue
        for signed in (True, False):
            usual = optimizer.usual_map(signed, code.device)
            if code.shape == usual.shape and torch.equal(code, usual):
                entries[key] = usual


def place(entries: dict[str, Any], p: Tensor, paged: bool) -> None:
    """Move a state to where its parameter is; paged ones, if large, to pinned host memory."""
    if not (paged and paging.pageable(p)):
        move(entries, p.device)
        return
    for key, value in entries.items():
        if key in {"state1", "state2"}:
            made = paging.pinned_zeros(value.shape, value.dtype, "load_state_dict")
            entries[key] = value.to(p.device) if made is None else made.copy_(value)
        elif isinstance(value, Tensor):
            entries[key] = value.to(p.device)


def move(entries: dict[str, Any], device: torch.device) -> None:
    """Move every tensor of a state."""
    for key, value in entries.items():
        if isinstance(value, Tensor):
            entries[key] = value.to(device)
