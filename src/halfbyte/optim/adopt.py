"""ADOPT, which bitsandbytes does not have, in all its forms."""

from __future__ import annotations

from typing import Any

from halfbyte.optim.states import Optimizer2State
from halfbyte.optim.variants import variant

__all__ = ["ADOPT", "ADOPT8bit", "PagedADOPT8bit"]


class ADOPT(Optimizer2State):
    """ADOPT: Adam that converges for any second beta, as it divides by the last step's squares. Decay is decoupled.

    The first step sets the squares and moves nothing (but for weight decay).

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the means of the normed gradient and of the gradient's square.
        eps: Smallest number that is divided by.
        weight_decay: Share of itself that a parameter loses in a step, times ``lr``.
        optim_bits: 8 or 32.
        args: Settings as an object.
        min_8bit_size: Parameters with fewer values keep 32-bit states.
        is_paged: Keep large states in host memory.
        **options: See :class:`halfbyte.optim.options.Options`.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            "adopt",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            is_paged=is_paged,
            **options,
        )


ADOPT8bit = variant(ADOPT, "ADOPT8bit", __name__, without=("optim_bits",), optim_bits=8)
PagedADOPT8bit = variant(
    ADOPT, "PagedADOPT8bit", __name__, without=("optim_bits", "is_paged"), optim_bits=8, is_paged=True
)
