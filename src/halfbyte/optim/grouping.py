"""Which parameters go together: the numbers of each one's step, and the bucket that these and its states put it in."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from halfbyte.optim import clipping, paging, sharding
from halfbyte.optim import state as storage
from halfbyte.optim.buckets import Bucket
from halfbyte.optim.hyper import numbers_of
from halfbyte.optim.trust import trust_scale

if TYPE_CHECKING:
    from halfbyte.optim.base import Optimizer8bit

__all__ = ["Assigned", "Chosen", "Place", "grouped"]

Chosen = tuple[dict[str, Any], Tensor, int, int]
"""A parameter that is stepped: its group, itself, the numbers of its group and of itself in it."""

Place = tuple[int, int]
"""Number of a group, and of a parameter in it: what a parameter's settings are looked up by."""

Assigned = tuple[Tensor, Bucket, Place]
"""A parameter, its bucket and its place."""


def grouped(optimizer: Optimizer8bit, chosen: Iterable[Chosen]) -> list[Assigned]:
    """The bucket of each parameter; their states are there and have been counted."""
    found: dict[Hashable, Bucket] = {}
    assigned: list[Assigned] = []
    known: dict[Hashable, dict[str, Any]] = {}
    for group, p, gindex, pindex in chosen:
        state = optimizer.state[p]
        config = optimizer.get_config(gindex, pindex, group)
        # Parameters of a group differ in their overrides and steps alone.
        key = (gindex, id(optimizer.mng.pid2config.get(id(p))), _hashable(state["step"]))
        if key not in known:
            known[key] = numbers_of(config, state["step"])
        bucket = _assign(optimizer, found, p, state, config, dict(known[key]))
        assigned.append((p, bucket, (gindex, pindex)))
    return assigned


def _assign(
    optimizer: Optimizer8bit,
    found: dict[Hashable, Bucket],
    p: Tensor,
    state: dict[str, Any],
    config: dict[str, Any],
    settings: dict[str, Any],
) -> Bucket:
    assert p.grad is not None
    rule, eight, part = optimizer.rule, storage.is_8bit(state), sharding.part_of(p)
    paged = paging.pages(optimizer.is_paged, p, state)
    param, grad = sharding.local(p.detach()), sharding.local(p.grad.detach())
    absmax = storage.absmax_of(state, rule) if eight else []
    maps = storage.maps_of(state, rule) if eight else []
    blocksize = storage.blocksize_here(p, absmax[0]) if eight else 0
    percentile = optimizer.options.percentile_clipping
    if percentile < 100:
        squared = sharding.total(grad.float().square().sum(), p)
        settings["grad_scale"] = clipping.percentile_scale(squared, state["gnorm_vec"], state["step"], percentile)
    if config["max_unorm"] > 0.0:
        settings["update_scale"] = trust_scale(optimizer, p, state, settings, config)
    key = (
        param.device,
        blocksize,
        config["skip_zeros"],
        id(part.group),
        paged,
        *map(id, maps),
        *map(_hashable, settings.values()),
    )
    if key not in found:
        bucket = Bucket(rule, settings, config["skip_zeros"], blocksize, maps, param.device)
        bucket.seed = optimizer.seed_of(state["step"])
        bucket.pager = optimizer.pagers[p.device] if paged else None
        found[key] = bucket
    found[key].add(part, param, grad, storage.states_of(state, rule), absmax)
    return found[key]


def _hashable(value: Any) -> Hashable:
    """A number itself; of a tensor, whose value only its device knows, which one it is."""
    return id(value) if isinstance(value, Tensor) else value
