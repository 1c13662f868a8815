"""The device itself: memory that keeps what is written, and one torch operation that gives the right numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.doctor.probes.steps.report import Report

__all__ = ["allocate", "random", "torch_op"]

SEED = 20241124


def random(*shape: int, seed: int = SEED) -> Tensor:
    """Standard normal numbers on the CPU in float64, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def allocate(device: str, thorough: bool) -> Report:
    """Write a pattern of 8 MiB (256 MiB when thorough) and read it back."""
    report = Report()
    count = (1 << 26) if thorough else (1 << 21)
    pattern = torch.arange(count, dtype=torch.int32)
    back = pattern.to(device).to("cpu")
    report.measure("words that came back different", int((back != pattern).sum()), 0)
    return report


def torch_op(device: str, thorough: bool) -> Report:
    """A 256 x 256 matmul in every dtype that models use, against float64."""
    del thorough
    report = Report()
    a, b = random(256, 256), random(256, 256, seed=SEED + 1)
    exact = a @ b
    # Tensor cores may take fp32 as TF32 (10 bits) where the user allowed it; the 16-bit limits are 2 roundings of each.
    limits = {torch.float32: 2e-3, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
    for dtype, limit in limits.items():
        got = (a.to(device, dtype) @ b.to(device, dtype)).cpu().double()
        name = str(dtype).removeprefix("torch.")
        report.measure(f"matmul {name}, relative error", float((got - exact).norm() / exact.norm()), limit)
    return report
