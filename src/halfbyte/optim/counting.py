"""Numbers of steps: Python numbers or, where a graph has to count, tensors that parameters stepped together share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["advance"]


def advance(stepped: Sequence[tuple[Tensor, dict[str, Any]]], every: Iterable[dict[str, Any]], on_device: bool) -> None:
    """Count one step for the parameters that take it.

    On the device, parameters that begin together count with one tensor: one addition for hundreds of them. Those that
    step without the others get a tensor of their own.

    Args:
        stepped: Parameters and their states.
        every: States of all parameters of the optimizer.
        on_device: Count new parameters there.
    """
    if not on_device:
        for _, state in stepped:
            state["step"] += 1
        return
    sharing = Counter(id(state["step"]) for state in every if "step" in state)
    stepping = Counter(id(state["step"]) for _, state in stepped)
    counted: dict[Any, Tensor] = {}
    for p, state in stepped:
        step = state["step"]
        own = isinstance(step, Tensor)
        key = id(step) if own else (p.device, step)
        if key not in counted:
            if not own:
                counted[key] = torch.full((), float(step), dtype=torch.float32, device=p.device)
            else:
                counted[key] = step if sharing[id(step)] == stepping[id(step)] else step.clone()
            counted[key] += 1
        state["step"] = counted[key]
