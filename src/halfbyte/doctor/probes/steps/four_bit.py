"""4-bit: quantize, dequantize and multiply, each against float64 arithmetic on the bytes that came out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.backends import explain
from halfbyte.doctor.probes.steps.basic import random
from halfbyte.doctor.probes.steps.report import Report
from halfbyte.formats import BLOCKSIZES_4BIT, DEFAULT_BLOCKSIZE_4BIT, codebook

__all__ = ["computed_by", "fp4", "matmul", "nf4"]

CHOICE_LIMIT = 1e-6
"""A code may be farther from the value than the nearest one by this share of absmax: a few fp32 roundings."""
DECODE_LIMITS = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""A decoded value may differ by one rounding of its dtype, relative to absmax."""
MATMUL_LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Relative error of the product: weights and result are rounded to the dtype, sums are fp32."""
TF32_LIMIT = 1e-3
"""For fp32 on a GPU: tensor cores may take the factors with 10 bits."""


def nf4(device: str, thorough: bool) -> Report:
    """Quantize and dequantize in NF4."""
    return _round_trip("nf4", device, thorough)


def fp4(device: str, thorough: bool) -> Report:
    """Quantize and dequantize in FP4."""
    return _round_trip("fp4", device, thorough)


def _round_trip(quant_type: str, device: str, thorough: bool) -> Report:
    report = Report()
    for blocksize in BLOCKSIZES_4BIT if thorough else (DEFAULT_BLOCKSIZE_4BIT,):
        for count in (64 * 1024, 4097) if thorough else (64 * 1024,):
            _one_round_trip(report, quant_type, device, blocksize, count)
    return report


def _one_round_trip(report: Report, quant_type: str, device: str, blocksize: int, count: int) -> None:
    label = f"{quant_type} block {blocksize}" + ("" if count % blocksize == 0 else f", {count} values")
    values = random(count).float()
    arguments = (values.to(device), blocksize, quant_type, torch.uint8)
    report.notes.append(f"{label}: quantized by {computed_by('quantize_4bit', *arguments)}")
    packed, absmax = torch.ops.halfbyte.quantize_4bit(*arguments)
    table = torch.tensor(codebook(quant_type).levels, dtype=torch.float64)
    codes = _unpack(packed)[:count]
    exact = values.double()
    scale = _spread(_block_maximum(exact, blocksize), blocksize, count)
    report.measure(
        f"{label}: absmax, relative error",
        _worst(_spread(absmax.cpu().double(), blocksize, count) / scale - 1),
        2.0**-23,
    )
    nearest = (exact[:, None] / scale[:, None] - table).abs().min(dim=1).values
    chosen = (exact / scale - table[codes]).abs()
    report.measure(f"{label}: code beyond the nearest", float((chosen - nearest).max()), CHOICE_LIMIT)
    for dtype, limit in DECODE_LIMITS.items():
        got = torch.ops.halfbyte.dequantize_4bit(packed, absmax, blocksize, quant_type, [count], dtype)
        error = _worst((got.cpu().double() - table[codes] * scale) / scale)
        report.measure(f"{label}: dequantized to {_name(dtype)}", error, limit)
    report.notes.append(f"{label}: error of the format itself {_share(table[codes] * scale, exact):.4f} of the values")


def matmul(device: str, thorough: bool) -> Report:
    """Multiply 1, 5 and 33 rows with an NF4 weight, and pass a gradient back."""
    report = Report()
    out_features, in_features = (1000, 1024) if thorough else (256, 512)
    weight = random(out_features, in_features).float().to(device)
    packed, absmax = torch.ops.halfbyte.quantize_4bit(weight, 64, "nf4", torch.uint8)
    table = torch.tensor(codebook("nf4").levels, dtype=torch.float64)
    scale = _spread(absmax.cpu().double(), 64, weight.numel())
    exact = (table[_unpack(packed)[: weight.numel()]] * scale).view(out_features, in_features)
    for dtype, limit in MATMUL_LIMITS.items():
        if dtype == torch.float32 and torch.device(device).type != "cpu":
            limit = TF32_LIMIT
        for rows in (1, 5, 33, 300) if thorough else (1, 5, 33):
            a = random(rows, in_features, seed=rows).to(dtype)
            arguments = (a.to(device), packed, [out_features, in_features], absmax, 64, "nf4")
            report.notes.append(f"{rows} rows, {_name(dtype)}: computed by {computed_by('gemm_4bit', *arguments)}")
            got = torch.ops.halfbyte.gemm_4bit(*arguments)
            error = _share(got.cpu().double(), a.double() @ exact.T)
            report.measure(f"{rows} row{'s' if rows > 1 else ''}, {_name(dtype)}", error, limit)
        gradient = random(5, out_features, seed=7).to(dtype)
        back = torch.ops.halfbyte.gemm_4bit_dgrad(
            gradient.to(device), packed, [out_features, in_features], absmax, 64, "nf4"
        )
        error = _share(back.cpu().double(), gradient.double() @ exact)
        report.measure(f"gradient, {_name(dtype)}", error, limit)
    return report


def computed_by(op: str, *arguments: Any) -> str:
    """Backend that the registry chooses for this call."""
    return next((verdict.backend for verdict in explain(op, *arguments) if verdict.reason is None), "none")


def _unpack(packed: Tensor) -> Tensor:
    """Codes in order: the high half of a byte comes first."""
    stream = packed.cpu().view(torch.uint8).view(-1)
    return torch.stack([stream >> 4, stream & 15], dim=1).view(-1).long()


def _block_maximum(values: Tensor, blocksize: int) -> Tensor:
    short = -values.numel() % blocksize
    return torch.nn.functional.pad(values.abs(), (0, short)).view(-1, blocksize).max(dim=1).values


def _spread(scales: Tensor, blocksize: int, count: int) -> Tensor:
    return scales.repeat_interleave(blocksize)[:count]


def _worst(errors: Tensor) -> float:
    """Largest magnitude; NaN if there is one."""
    return float(errors.abs().max()) if not bool(errors.isnan().any()) else float("nan")


def _share(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
