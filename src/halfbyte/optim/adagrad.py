"""Adagrad, in all its forms."""

from __future__ import annotations

from typing import Any

from halfbyte.optim.refusals import refuse
from halfbyte.optim.states import Optimizer1State
from halfbyte.optim.variants import variant

__all__ = ["Adagrad", "Adagrad8bit", "Adagrad32bit"]


class Adagrad(Optimizer1State):
    """Adagrad. Weight decay is coupled: it joins the gradient, in the state and in the step.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        lr_decay: Only 0.
        weight_decay: Times the parameter, added to the gradient.
        initial_accumulator_value: Only 0.
        eps: Keeps the division finite.
        optim_bits: 8 or 32.
        args: Settings as an object.
        min_8bit_size: Parameters with fewer values keep 32-bit states.
        **options: See :class:`halfbyte.optim.options.Options`.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        owner = type(self).__name__
        refuse(owner, "initial_accumulator_value", initial_accumulator_value, 0, "torch.optim.Adagrad has it")
        refuse(owner, "lr_decay", lr_decay, 0, "use a scheduler of torch.optim.lr_scheduler")
        super().__init__(
            "adagrad",
            params,
            lr,
            (0.0, 0.0),
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            **options,
        )


Adagrad8bit = variant(
    Adagrad, "Adagrad8bit", __name__, only={"optim_bits": 8}, defaults={"optim_bits": 8}, optim_bits=8
)
Adagrad32bit = variant(Adagrad, "Adagrad32bit", __name__, optim_bits=32)
