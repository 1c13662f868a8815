"""Lion, in all its forms."""

from __future__ import annotations

from typing import Any

from halfbyte.optim.states import Optimizer1State
from halfbyte.optim.variants import variant

__all__ = ["Lion", "Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit"]


class Lion(Optimizer1State):
    """Lion: steps by the sign of a mean. Weight decay is decoupled, in 8 bits and in 32.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate; a third to a tenth of AdamW's.
        betas: Decay rates of the mean that is looked at and of the one that is kept.
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
        lr: Any = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            "lion",
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            is_paged=is_paged,
            **options,
        )


_BITS, _PAGED = ("optim_bits",), ("is_paged",)

Lion8bit = variant(Lion, "Lion8bit", __name__, without=_BITS, optim_bits=8)
Lion32bit = variant(Lion, "Lion32bit", __name__, without=_BITS, optim_bits=32)
PagedLion = variant(Lion, "PagedLion", __name__, without=_PAGED, is_paged=True)
PagedLion8bit = variant(Lion, "PagedLion8bit", __name__, without=_BITS + _PAGED, optim_bits=8, is_paged=True)
PagedLion32bit = variant(Lion, "PagedLion32bit", __name__, without=_BITS + _PAGED, optim_bits=32, is_paged=True)
