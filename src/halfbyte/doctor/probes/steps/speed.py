"""How fast the device is: memory bandwidth, and a 4-bit product against the same in 16 bits."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from halfbyte.doctor.probes.steps.basic import random
from halfbyte.doctor.probes.steps.four_bit import computed_by
from halfbyte.doctor.probes.steps.report import Report

__all__ = ["bandwidth", "four_bit_against_16"]

SLOWEST = 0.8
"""4 bits at batch 1 read a quarter of the bytes; slower than this share of the 16-bit speed is a slow path."""


def bandwidth(device: str, thorough: bool) -> Report:
    """Copy 256 MiB (64 MiB on a CPU) and count bytes read and written."""
    del thorough
    report = Report()
    size = (1 << 26) if torch.device(device).type == "cpu" else (1 << 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _median(lambda: target.copy_(source), device)
    report.measure("memory bandwidth (copy)", 2 * size / seconds / 1e9, unit="GB/s")
    return report


def four_bit_against_16(device: str, thorough: bool) -> Report:
    """One row times a 4096 x 4096 weight, NF4 against the 16-bit dtype that models use there."""
    del thorough
    report = Report()
    kind = torch.device(device).type
    native = kind != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8 or torch.version.hip is not None
    dtype = torch.bfloat16 if native else torch.float16
    size = 4096
    weight = random(size, size).float().to(device)
    packed, absmax = torch.ops.halfbyte.quantize_4bit(weight, 64, "nf4", torch.uint8)
    half = weight.to(dtype)
    row = random(1, size).to(device, dtype)
    # As many copies as do not fit the cache together: a model's layers are never in the cache when their turn comes.
    copies = 1 if kind == "cpu" else 8
    halves, packs = [half.clone() for _ in range(copies)], [packed.clone() for _ in range(copies)]
    slow = _median(lambda: [torch.nn.functional.linear(row, each) for each in halves], device) / copies
    fast = (
        _median(
            lambda: [torch.ops.halfbyte.gemm_4bit(row, each, [size, size], absmax, 64, "nf4") for each in packs], device
        )
        / copies
    )
    name = str(dtype).removeprefix("torch.")
    backend = computed_by("gemm_4bit", row, packed, [size, size], absmax, 64, "nf4")
    report.notes.append(f"4-bit product computed by {backend}")
    report.measure(f"{name} product", slow * 1e6, unit="us")
    report.measure("4-bit product", fast * 1e6, unit="us")
    report.measure(f"speed of 4-bit over {name}", slow / fast, SLOWEST, unit="x", at_least=True)
    return report


def _median(call: Callable[[], object], device: str, repeats: int = 15) -> float:
    for _ in range(3):
        call()
    seconds: list[float] = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repeats // 2]


def _wait(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.get_device_module(device).synchronize(device)
