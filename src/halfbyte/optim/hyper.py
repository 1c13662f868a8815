"""The numbers of a step: what follows from a parameter's settings, and the tensor that ops take."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from halfbyte.rules import hyper

__all__ = ["hyper_tensor", "numbers_of", "slow_beta"]


def numbers_of(config: dict[str, Any], step: Any) -> dict[str, Any]:
    """Numbers of a step, as :func:`halfbyte.rules.hyper` takes them.

    Args:
        config: A parameter's settings, as ``Optimizer8bit.get_config`` returns them.
        step: Number of the step, from 1; a scalar tensor where steps are counted on the device.
    """
    betas = config["betas"]
    beta1, beta2, beta3 = (*betas, 0.0)[:3] if len(betas) < 3 else betas
    alpha, t_alpha, t_beta3 = config["alpha"], config["t_alpha"], config["t_beta3"]
    if t_alpha:
        alpha = _least(step * alpha / t_alpha, alpha)
    if t_beta3:
        beta3 = slow_beta(beta1, beta3, step, t_beta3)
    return {
        "lr": config["lr"],
        "beta1": beta1,
        "beta2": beta2,
        "beta3": beta3,
        "alpha": alpha,
        "eps": config["eps"],
        "weight_decay": config["weight_decay"],
        "step": step,
    }


def slow_beta(beta1: float, beta3: float, step: Any, horizon: int) -> Any:
    """AdEMAMix's schedule of the slow mean's beta: its half-life grows linearly from that of ``beta1``.

    Pagliardini et al., arXiv:2409.03137, section 3.1.

    >>> round(slow_beta(0.9, 0.9999, 500, 1000), 6)
    0.9998
    """
    first, last = math.log(beta1), math.log(beta3)
    share = step / horizon
    exponent = first * last / ((1 - share) * last + share * first)
    found = exponent.exp() if isinstance(exponent, Tensor) else math.exp(exponent)
    return _least(found, beta3)


def hyper_tensor(device: torch.device, **settings: Any) -> Tensor:
    """fp32 tensor in the order of :data:`halfbyte.rules.FIELDS`; on the CPU if every setting is a Python number.

    Args:
        device: Where it goes if a setting (step, lr, a scale) is a tensor, computed there in fp64.
        settings: Arguments of :func:`halfbyte.rules.hyper`.
    """
    if not any(isinstance(value, Tensor) for value in settings.values()):
        return torch.tensor(hyper(**settings), dtype=torch.float32, device="cpu")
    exact = {name: _exact(value, device) for name, value in settings.items()}
    values = [_exact(value, device) for value in hyper(**exact)]
    return torch.stack([value if isinstance(value, Tensor) else _filled(value, device) for value in values]).float()


def _exact(value: Any, device: torch.device) -> Any:
    return value.detach().to(device, torch.float64).reshape(()) if isinstance(value, Tensor) else value


def _filled(value: float, device: torch.device) -> Tensor:
    # A fill is a kernel with an immediate: no copy from the host, so it may be captured in a graph.
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _least(a: Any, b: Any) -> Any:
    """The smaller of two numbers or scalar tensors.

    >>> _least(2.0, 1.0)
    1.0
    """
    if isinstance(a, Tensor):
        return torch.clamp(a, max=float(b))
    return min(a, b)
