"""One real 8-bit optimizer step: the parameter must change by what AdamW's rule says, on a tensor that uses 8 bits."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.doctor.probes.steps.basic import random
from halfbyte.doctor.probes.steps.report import Report, Skip

__all__ = ["adamw_step"]

RATE, DECAY, BETAS, EPSILON = 1e-2, 0.1, (0.9, 0.95), 1e-8
STEP_LIMIT = 1e-4
"""The first step starts from zero states: only fp32 rounding separates it from the rule."""
STATE_LIMIT = 0.1
"""The third step comes from 8-bit states: a mean error of this share of the change is what 8 bits cost."""


def adamw_step(device: str, thorough: bool) -> Report:
    """Three steps of AdamW with 8-bit states on 64 x 1024 values, against the rule in float64."""
    del thorough
    optimizer_class = _adamw8bit()
    start, gradients = random(64, 1024), [random(64, 1024, seed=seed) for seed in (1, 2, 3)]
    parameter = torch.nn.Parameter(start.float().to(device))
    optimizer = optimizer_class([parameter], lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    report = Report()
    exact = _rule(start.float().double(), [gradient.float().double() for gradient in gradients])
    previous = start.float().double()
    for number, (gradient, expected) in enumerate(zip(gradients, exact, strict=True), 1):
        parameter.grad = gradient.float().to(device)
        optimizer.step()
        if number in {1, 3}:
            change = float((expected - previous).norm())
            error = float((parameter.detach().cpu().double() - expected).norm()) / change
            limit = STEP_LIMIT if number == 1 else STATE_LIMIT
            report.measure(f"AdamW8bit, step {number}: error in the change", error, limit)
        previous = expected
    stored = {
        value.dtype for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    }
    report.measure("states kept in 8 bits (1 = yes)", float(torch.uint8 in stored), 1, at_least=True)
    return report


def _adamw8bit() -> Callable[..., torch.optim.Optimizer]:
    missing = "not reached: halfbyte has no optimizers in this version"
    if importlib.util.find_spec("halfbyte.optim") is None:
        raise Skip(missing)
    found = getattr(importlib.import_module("halfbyte.optim"), "AdamW8bit", None)
    if found is None:
        raise Skip(missing)
    return found


def _rule(start: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """Decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2), in float64."""
    p, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
    states: list[Tensor] = []
    for t, g in enumerate(gradients, 1):
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g * g
        step = (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPSILON)
        p = p * (1 - RATE * DECAY) - RATE * step
        states.append(p)
    return states
