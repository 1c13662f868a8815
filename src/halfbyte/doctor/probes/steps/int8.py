"""int8: row-wise quantization, the exact integer product, and LLM.int8() with outlier columns, against float64."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.doctor.probes.steps.basic import random
from halfbyte.doctor.probes.steps.four_bit import computed_by
from halfbyte.doctor.probes.steps.report import Report

__all__ = ["linear"]

CODE_MAX = 127
THRESHOLD = 6.0
ROUNDING_LIMIT = 0.5 + 1e-4
"""A code is at most half a step from the value; fp32 arithmetic may move a tie."""
PRODUCT_LIMITS = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Relative error: the integer product is exact, scaling is fp32, the result is rounded once."""


def linear(device: str, thorough: bool) -> Report:
    """Quantize, multiply exactly, and multiply with and without outliers."""
    report = Report()
    for dtype, limit in PRODUCT_LIMITS.items():
        for rows in (1, 5, 33, 300) if thorough else (1, 33):
            _one(report, device, dtype, rows, limit)
    return report


def _one(report: Report, device: str, dtype: torch.dtype, rows: int, limit: float) -> None:
    label = f"{rows} row{'s' if rows > 1 else ''}, {str(dtype).removeprefix('torch.')}"
    weight = random(192, 256).to(dtype)
    a = random(rows, 256, seed=rows).to(dtype)
    a[0, 17] = 40.0  # one outlier column
    codes, scales, _ = torch.ops.halfbyte.int8_vectorwise_quant(weight.to(device))
    exact_weight = _decode(codes, scales)
    steps = weight.double() / (scales.cpu().double()[:, None] / CODE_MAX)
    distance = float((steps - codes.cpu().double()).abs().max())
    report.measure(f"{label}: distance from the code, in steps", distance, ROUNDING_LIMIT)

    a_codes, a_scales, columns = torch.ops.halfbyte.int8_vectorwise_quant(a.to(device), THRESHOLD)
    product = torch.ops.halfbyte.int8_linear_matmul(a_codes, codes).cpu().double()
    wrong = (product - a_codes.cpu().double() @ codes.cpu().double().T).abs().max()
    report.measure(f"{label}: integer product, difference", float(wrong), 0)

    report.notes.append(f"{label}: computed by {computed_by('int8_linear', a.to(device), codes, scales, THRESHOLD)}")
    got = torch.ops.halfbyte.int8_linear(a.to(device), codes, scales, THRESHOLD).cpu().double()
    outliers = torch.zeros_like(a).double()
    kept = columns.cpu()
    outliers[:, kept] = a.double()[:, kept]
    inside = _decode(a_codes, a_scales)
    inside[:, kept] = 0.0
    exact = (inside + outliers) @ exact_weight.T
    report.measure(f"{label}: product, relative error", float((got - exact).norm() / exact.norm()), limit)


def _decode(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.cpu().double() * scales.cpu().double()[:, None] / CODE_MAX
