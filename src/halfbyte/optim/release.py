"""Steps inside the backward pass: each parameter as soon as its gradient is complete, which is then freed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from halfbyte.optim.base import Optimizer8bit

__all__ = ["step_in_backward"]


def step_in_backward(optimizer: Optimizer8bit) -> Callable[[], None]:
    """Let ``backward()`` step the optimizer, so that at no time all gradients are there at once.

    What needs all gradients first (clipping by their common norm, GradScaler, accumulation over several passes) does
    not go with it. ``optimizer.step()`` then finds no gradient and does nothing.

    Args:
        optimizer: Its present parameters are meant.

    Returns:
        A function that ends it.

    >>> import torch
    >>> from halfbyte.optim import AdamW8bit
    >>> p = torch.nn.Parameter(torch.ones(3))
    >>> stop = step_in_backward(AdamW8bit([p], lr=0.1, weight_decay=0.0))
    >>> p.sum().backward()
    >>> p.grad, p.detach()
    (None, tensor([0.9000, 0.9000, 0.9000]))
    """
    handles: list[Any] = []
    for gindex, group in enumerate(optimizer.param_groups):
        for pindex, p in enumerate(group["params"]):
            if p.requires_grad:
                handles.append(p.register_post_accumulate_grad_hook(_hook(optimizer, group, gindex, pindex)))

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


def _hook(optimizer: Optimizer8bit, group: dict[str, Any], gindex: int, pindex: int) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        optimizer.step_one(group, p, gindex, pindex)
        p.grad = None

    return hook
