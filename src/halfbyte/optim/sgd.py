"""SGD with momentum, in all its forms."""

from __future__ import annotations

from typing import Any

from halfbyte.errors import ArgumentError, UnsupportedError
from halfbyte.optim.states import Optimizer1State
from halfbyte.optim.variants import variant

__all__ = ["SGD", "SGD8bit", "SGD32bit", "momentum_rule"]


def momentum_rule(owner: str, momentum: float, dampening: float, nesterov: bool) -> str:
    """Which rule these arguments ask for.

    Raises:
        UnsupportedError: No momentum.
        ArgumentError: Nesterov's momentum with dampening.

    >>> momentum_rule("SGD", 0.9, 0.0, True)
    'nesterov'
    """
    if momentum == 0:
        raise UnsupportedError(
            f"{owner} without momentum is not supported!", hint="torch.optim.SGD keeps no state then"
        )
    if nesterov and dampening != 0:
        raise ArgumentError(f"{owner} with nesterov=True and dampening={dampening}", expected="dampening=0")
    return "nesterov" if nesterov else "momentum"


class SGD(Optimizer1State):
    """Stochastic gradient descent with momentum, as torch has it. Weight decay is coupled: it joins the gradient.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        momentum: Decay rate of the momentum; not 0.
        dampening: Share of the gradient that does not join the momentum after the first step.
        weight_decay: Times the parameter, added to the gradient.
        nesterov: Look ahead along the momentum.
        optim_bits: 8 or 32.
        args: Settings as an object.
        min_8bit_size: Parameters with fewer values keep 32-bit states.
        **options: See :class:`halfbyte.optim.options.Options`.
    """

    def __init__(
        self,
        params: Any,
        lr: Any,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        super().__init__(
            momentum_rule(type(self).__name__, momentum, dampening, nesterov),
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            **options,
        )


SGD8bit = variant(SGD, "SGD8bit", __name__, without=("optim_bits",), optim_bits=8)
SGD32bit = variant(SGD, "SGD32bit", __name__, without=("optim_bits",), optim_bits=32)
