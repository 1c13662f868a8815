"""AdEMAMix, in all its forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from halfbyte.optim.states import Optimizer2State
from halfbyte.optim.variants import variant

__all__ = [
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "_ReferenceAdEMAMix",
]


class AdEMAMix(Optimizer2State):
    """AdEMAMix: Adam with a second mean that remembers ten thousand steps. Weight decay is decoupled.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the fast mean, of the squares, of the slow mean.
        alpha: Weight of the slow mean.
        t_alpha: Steps over which ``alpha`` rises from 0; None for no rise.
        t_beta3: Steps over which the third beta rises from the first; None for no rise.
        eps: Keeps the division finite.
        weight_decay: Share of itself that a parameter loses in a step, times ``lr``.
        optim_bits: 8 or 32.
        min_8bit_size: Parameters with fewer values keep 32-bit states.
        is_paged: Keep large states in host memory.
        **options: See :class:`halfbyte.optim.options.Options`.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            "ademamix",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            None,
            min_8bit_size,
            is_paged=is_paged,
            alpha=alpha,
            t_alpha=t_alpha,
            t_beta3=t_beta3,
            **options,
        )


_BITS, _PAGED = ("optim_bits",), ("is_paged",)

AdEMAMix8bit = variant(AdEMAMix, "AdEMAMix8bit", __name__, without=_BITS, optim_bits=8)
AdEMAMix32bit = variant(AdEMAMix, "AdEMAMix32bit", __name__, without=_BITS, optim_bits=32)
PagedAdEMAMix = variant(AdEMAMix, "PagedAdEMAMix", __name__, without=_PAGED, is_paged=True)
PagedAdEMAMix8bit = variant(AdEMAMix8bit, "PagedAdEMAMix8bit", __name__, without=_PAGED, is_paged=True)
PagedAdEMAMix32bit = variant(AdEMAMix32bit, "PagedAdEMAMix32bit", __name__, without=_PAGED, is_paged=True)


class _ReferenceAdEMAMix(torch.optim.Optimizer):
    """AdEMAMix in plain torch, under the name that bitsandbytes' tests import: what the others are compared with.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the fast mean, of the squares, of the slow mean.
        alpha: Weight of the slow mean.
        eps: Keeps the division finite.
        weight_decay: Share of itself that a parameter loses in a step, times ``lr``.
        t_beta3: Steps over which the third beta rises from the first; None for no rise.
        t_alpha: Steps over which ``alpha`` rises from 0; None for no rise.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        t_beta3: int | None = None,
        t_alpha: int | None = None,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "t_beta3": t_beta3, "t_alpha": t_alpha})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """arXiv:2409.03137, algorithm 1, with the schedules of its section 3."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            beta1, beta2, beta3 = group["betas"]
            alpha, rising = group["alpha"], group["t_beta3"]
            if group["t_alpha"] is not None:
                alpha *= min(step / group["t_alpha"], 1.0)
            if rising is not None and step < rising:
                first, last = math.log(beta1), math.log(beta3)
                beta3 = min(math.exp(first * last / ((1 - step / rising) * last + step / rising * first)), beta3)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["m1_m2"], state["nu"] = p.new_zeros((2, *p.shape)), torch.zeros_like(p)
                fast, slow, squares = *state["m1_m2"].unbind(), state["nu"]
                fast.lerp_(p.grad, 1 - beta1)
                slow.lerp_(p.grad, 1 - beta3)
                squares.lerp_(p.grad.square(), 1 - beta2)
                length = squares.sqrt() / (1 - beta2**step) ** 0.5 + group["eps"]
                update = (fast / (1 - beta1**step) + alpha * slow) / length
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))
        return loss
