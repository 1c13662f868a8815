"""LARS, in all its forms, and LARS in plain torch."""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.errors import ArgumentError
from halfbyte.optim.naming import NamedType
from halfbyte.optim.sgd import momentum_rule
from halfbyte.optim.states import Optimizer1State
from halfbyte.optim.variants import variant

__all__ = ["LARS", "LARS8bit", "LARS32bit", "PytorchLARS"]


class LARS(Optimizer1State):
    """SGD with momentum whose update is never longer than ``max_unorm`` times the parameter. Decay is coupled.

    You, Gitman and Ginsburg, arXiv:1708.03888, with a bound in place of a ratio, as in bitsandbytes. A parameter of
    zeros moves freely.

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
        max_unorm: Bound of the update's norm relative to the parameter's.
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
        max_unorm: float = 0.02,
        **options: Any,
    ) -> None:
        rule = momentum_rule(type(self).__name__, momentum, dampening, nesterov)
        super().__init__(
            "lars" if rule == "momentum" else rule,
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm=max_unorm,
            **options,
        )


LARS8bit = variant(LARS, "LARS8bit", __name__, without=("optim_bits",), optim_bits=8)
LARS32bit = variant(LARS, "LARS32bit", __name__, without=("optim_bits",), optim_bits=32)


class PytorchLARS(torch.optim.Optimizer, metaclass=NamedType):
    """LARS in plain torch ops, with torch's state names: the one to compare with. Arguments as in :class:`LARS`."""

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        for name, value in (("learning rate", lr), ("momentum value", momentum), ("weight_decay value", weight_decay)):
            if value < 0.0:
                raise ArgumentError(f"Invalid {name}: {value}", expected="0 or more")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ArgumentError("Nesterov momentum requires a momentum and zero dampening")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "max_unorm": max_unorm,
            },
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step every parameter that has a gradient; returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(group, p)
        return loss

    def _step(self, group: dict[str, Any], p: torch.Tensor) -> None:
        assert p.grad is not None
        update, state, momentum = p.grad.add(p, alpha=group["weight_decay"]), self.state[p], group["momentum"]
        if momentum != 0:
            buffer = state.get("momentum_buffer")
            if buffer is None:
                buffer = state["momentum_buffer"] = update.clone()
            else:
                buffer.mul_(momentum).add_(update, alpha=1 - group["dampening"])
            update = update + buffer * momentum if group["nesterov"] else buffer
        scale = torch.ones((), device=p.device)
        if group["max_unorm"] > 0.0:
            bound, length = group["max_unorm"] * p.float().norm(), update.float().norm()
            scale = torch.where((length > bound) & (bound > 0), bound / length, scale)
        p.sub_((group["lr"] * scale * update).to(p.dtype))
