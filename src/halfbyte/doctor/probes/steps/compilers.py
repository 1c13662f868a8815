"""The compilers below us: one Triton kernel on a GPU, one numba function on the CPU, compiled here and checked."""

from __future__ import annotations

import importlib.util
import time

import torch

from halfbyte.doctor.probes.steps.report import Report, Skip

__all__ = ["numba_kernel", "triton_kernel"]


def triton_kernel(device: str, thorough: bool) -> Report:
    """Compile and launch a kernel that adds two vectors."""
    del thorough
    if torch.device(device).type not in {"cuda", "xpu"}:
        raise Skip("Triton is not used on this device")
    if importlib.util.find_spec("triton") is None:
        raise Skip("triton is not installed")
    from halfbyte.doctor.probes import triton_add

    report = Report()
    x = torch.arange(5000, dtype=torch.float32, device=device)
    y = torch.full_like(x, 0.5)
    seconds: list[float] = []
    wrong = 0
    for _ in range(2):
        start = time.perf_counter()
        got = triton_add.add(x, y)
        wrong += int((got.cpu() != torch.arange(5000) + 0.5).sum())
        seconds.append(time.perf_counter() - start)
    report.measure("sums that came out wrong", wrong, 0)
    report.measure("first call", seconds[0], unit="s")
    report.measure("second call", seconds[1], unit="s")
    return report


def numba_kernel(device: str, thorough: bool) -> Report:
    """Compile a function with numba and compare its result."""
    del thorough
    if torch.device(device).type != "cpu":
        raise Skip("numba is only used on the CPU")
    if importlib.util.find_spec("numba") is None:
        raise Skip("numba is not installed")
    from halfbyte.doctor.probes import numba_sum

    report = Report()
    start = time.perf_counter()
    got = numba_sum.sum_of_squares(1000)
    report.measure("numba's result, difference", abs(got - sum(i * i for i in range(1000))), 0)
    report.measure("compiled in", time.perf_counter() - start, unit="s")
    return report
