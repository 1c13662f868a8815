"""Adam, in all its forms."""

from __future__ import annotations

from typing import Any

from halfbyte.optim.refusals import refuse_amsgrad
from halfbyte.optim.states import Optimizer2State
from halfbyte.optim.variants import variant

__all__ = ["Adam", "Adam8bit", "Adam32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit"]


class Adam(Optimizer2State):
    """Adam. As in bitsandbytes, weight decay is decoupled: AdamW with another default.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the means of the gradient and of its square.
        eps: Keeps the division finite.
        weight_decay: Share of itself that a parameter loses in a step, times ``lr``.
        amsgrad: Only False.
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
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        refuse_amsgrad(type(self).__name__, amsgrad)
        super().__init__(
            "adam",
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


Adam8bit = variant(Adam, "Adam8bit", __name__, only={"optim_bits": 32}, optim_bits=8)
Adam32bit = variant(Adam, "Adam32bit", __name__, optim_bits=32)
PagedAdam = variant(Adam, "PagedAdam", __name__, is_paged=True)
PagedAdam8bit = variant(Adam, "PagedAdam8bit", __name__, only={"optim_bits": 32}, optim_bits=8, is_paged=True)
PagedAdam32bit = variant(Adam, "PagedAdam32bit", __name__, optim_bits=32, is_paged=True)
