"""LARS' and LAMB's bound: an update is never longer than a share of the parameter's own length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.functional.optimizer import bounded
from halfbyte.optim import sharding
from halfbyte.optim import state as storage

if TYPE_CHECKING:
    from halfbyte.optim.base import Optimizer8bit

__all__ = ["trust_scale"]


def trust_scale(
    optimizer: Optimizer8bit, p: Tensor, state: dict[str, Any], settings: dict[str, Any], config: dict[str, Any]
) -> Tensor:
    """Factor, fp32 scalar on ``p``'s device, that keeps the update's norm below ``max_unorm`` times the parameter's.

    Args:
        optimizer: Whose step it is.
        p: The parameter; it has a gradient.
        state: Its states; ``unorm_vec`` gets the update's squared norm.
        settings: Numbers of the step, as :func:`halfbyte.rules.hyper` takes them.
        config: Settings of ``p``.
    """
    rule, param = optimizer.rule, sharding.local(p.detach())
    states = [one.to(p.device) for one in storage.states_of(state, rule)]
    if storage.is_8bit(state):
        scales = storage.absmax_of(state, rule)
        blocksize = storage.blocksize_here(p, scales[0])
        states = [
            sharding.decode(codes, absmax, code, blocksize, p)
            for codes, absmax, code in zip(states, scales, storage.maps_of(state, rule), strict=True)
        ]
    assert p.grad is not None
    squared = torch.ops.halfbyte.optimizer_update_norm(
        [param],
        [sharding.local(p.grad.detach())],
        states,
        optimizer.hyper_tensor_of(settings, param.device),
        rule.name,
        config["skip_zeros"],
    )
    total = sharding.total(torch.cat([squared, param.float().square().sum().reshape(1)]), p)
    state["unorm_vec"].copy_(total[:1])
    length, size = total.sqrt().unbind()
    return bounded(length, size, config["max_unorm"], config["eps"], rule)
