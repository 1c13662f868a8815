"""Bases of the optimizers with one and with two states, for subclassing as in bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.errors import ArgumentError
from halfbyte.optim.base import Optimizer8bit
from halfbyte.optim.options import Options

__all__ = ["Optimizer1State", "Optimizer2State"]


def _check(lr: Any, eps: float, betas: Sequence[float], weight_decay: float) -> None:
    if not lr >= 0.0:
        raise ArgumentError(f"Invalid learning rate: {lr}", expected="0 or more")
    if not eps >= 0.0:
        raise ArgumentError(f"Invalid epsilon value: {eps}", expected="0 or more")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ArgumentError(f"Invalid beta parameter at index {index}: {beta}", expected="0 to below 1")
    if not weight_decay >= 0.0:
        raise ArgumentError(f"Invalid weight_decay value: {weight_decay}", expected="0 or more")


class Optimizer2State(Optimizer8bit):
    """An optimizer whose rule keeps two states (AdEMAMix: three, two of them stacked).

    Args:
        optimizer_name: A rule's name, as ``"adam"``.
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the means; also as text, ``"(0.9, 0.999)"``.
        eps: Keeps the division finite.
        weight_decay: Coupled or decoupled as the rule has it.
        optim_bits: 8 or 32.
        args: An object with ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and ``skip_zeros``, instead of those.
        min_8bit_size: Parameters with fewer values keep 32-bit states.
        max_unorm: Bound of the update's norm relative to the parameter's; 0 for none.
        skip_zeros: Leave values alone whose gradient is exactly zero.
        is_paged: Keep large states in host memory.
        alpha: AdEMAMix: weight of the slow mean.
        t_alpha: AdEMAMix: steps over which ``alpha`` rises from 0.
        t_beta3: AdEMAMix: steps over which the third beta rises from the first.
        **options: See :class:`halfbyte.optim.options.Options`.
    """

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        **options: Any,
    ) -> None:
        chosen = Options.of(options, type(self).__name__)
        if isinstance(betas, str):
            betas = [float(beta) for beta in betas.strip("() ").split(",")]
        _check(lr, eps, betas, weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params, {**defaults, "alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}, optim_bits, is_paged
        )
        self.options = chosen
        self.use(optimizer_name, optim_bits, args, min_8bit_size, max_unorm, skip_zeros)


class Optimizer1State(Optimizer8bit):
    """An optimizer whose rule keeps one state. Arguments as in :class:`Optimizer2State`."""

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        chosen = Options.of(options, type(self).__name__)
        _check(lr, eps, betas, weight_decay)
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, optim_bits, is_paged
        )
        self.options = chosen
        self.use(optimizer_name, optim_bits, args, min_8bit_size, max_unorm, skip_zeros)
