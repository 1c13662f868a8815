"""LAMB, in all its forms."""

from __future__ import annotations

from typing import Any

from halfbyte.optim.refusals import refuse, refuse_amsgrad
from halfbyte.optim.states import Optimizer2State
from halfbyte.optim.variants import variant

__all__ = ["LAMB", "LAMB8bit", "LAMB32bit"]


class LAMB(Optimizer2State):
    """Adam whose update is never longer than ``max_unorm`` times the parameter. Weight decay is decoupled.

    You et al., arXiv:1904.00962, with a bound in place of a ratio, as in bitsandbytes. A parameter of zeros moves
    freely.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        bias_correction: Free the means of their bias towards zero.
        betas: Decay rates of the means of the gradient and of its square.
        eps: Keeps the division finite.
        weight_decay: Share of itself that a parameter loses in a step, times ``lr``.
        amsgrad: Only False.
        adam_w_mode: Only True.
        optim_bits: 8 or 32.
        args: Settings as an object.
        min_8bit_size: Parameters with fewer values keep 32-bit states.
        max_unorm: Bound of the update's norm relative to the parameter's.
        **options: See :class:`halfbyte.optim.options.Options`.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Any,
    ) -> None:
        owner = type(self).__name__
        refuse_amsgrad(owner, amsgrad)
        refuse(owner, "adam_w_mode", bool(adam_w_mode), True, "add weight_decay * p to the gradients yourself")
        super().__init__(
            "lamb",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm=max_unorm,
            **options,
        )
        self.bias_correction = bias_correction


LAMB8bit = variant(LAMB, "LAMB8bit", __name__, without=("optim_bits",), optim_bits=8)
LAMB32bit = variant(LAMB, "LAMB32bit", __name__, without=("optim_bits",), optim_bits=32)
