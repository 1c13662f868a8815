"""AdEMAMix, in all its forms."""

from __future__ import annotations

from typing import Any

from halfbyte.optim.states import Optimizer2State
from halfbyte.optim.variants import variant

__all__ = [
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
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
