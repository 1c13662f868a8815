"""RMSprop, in all its forms."""

from __future__ import annotations

from typing import Any

from halfbyte.errors import UnsupportedError
from halfbyte.optim.refusals import refuse
from halfbyte.optim.states import Optimizer1State
from halfbyte.optim.variants import variant

__all__ = ["RMSprop", "RMSprop8bit", "RMSprop32bit"]


class RMSprop(Optimizer1State):
    """RMSprop. Weight decay is coupled: it joins the gradient, in the state and in the step.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        alpha: Decay rate of the mean of squares; not 0.
        eps: Keeps the division finite.
        weight_decay: Times the parameter, added to the gradient.
        momentum: Only 0.
        centered: Only False.
        optim_bits: 8 or 32.
        args: Settings as an object.
        min_8bit_size: Parameters with fewer values keep 32-bit states.
        **options: See :class:`halfbyte.optim.options.Options`.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        owner = type(self).__name__
        if alpha == 0:
            raise UnsupportedError(f"{owner} with alpha==0.0 is not supported!", hint="torch.optim.RMSprop has it")
        if centered:
            raise UnsupportedError(f"Centered {owner} is not supported!", hint="torch.optim.RMSprop has it")
        refuse(owner, "momentum", momentum, 0, "torch.optim.RMSprop(momentum=...) has it, in 32 bits")
        super().__init__(
            "rmsprop",
            params,
            lr,
            (alpha, momentum),
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            **options,
        )


RMSprop8bit = variant(RMSprop, "RMSprop8bit", __name__, without=("optim_bits",), optim_bits=8)
RMSprop32bit = variant(RMSprop, "RMSprop32bit", __name__, without=("optim_bits",), optim_bits=32)
