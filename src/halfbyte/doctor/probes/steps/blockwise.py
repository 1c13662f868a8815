"""8-bit blockwise: the round trip that optimizer states and nested absmax go through, against float64."""

from __future__ import annotations

import torch

from halfbyte.doctor.probes.steps.basic import random
from halfbyte.doctor.probes.steps.four_bit import computed_by
from halfbyte.doctor.probes.steps.report import Report
from halfbyte.formats.dynamic import dynamic_map

__all__ = ["round_trip"]


def round_trip(device: str, thorough: bool) -> Report:
    """Quantize and dequantize with the signed and unsigned dynamic map."""
    report = Report()
    for signed in (True, False):
        for blocksize in (64, 256, 4096) if thorough else (256,):
            _one(report, device, signed, blocksize)
    return report


def _one(report: Report, device: str, signed: bool, blocksize: int) -> None:
    label = f"{'signed' if signed else 'unsigned'} block {blocksize}"
    values = random(16, 4096).float()
    values = values if signed else values.square()
    code = torch.from_numpy(dynamic_map(signed=signed))
    arguments = (values.to(device), code.to(device), blocksize)
    report.notes.append(f"{label}: quantized by {computed_by('quantize_blockwise', *arguments)}")
    codes, absmax = torch.ops.halfbyte.quantize_blockwise(*arguments)
    exact = values.double().view(-1, blocksize)
    scale = exact.abs().max(dim=1, keepdim=True).values
    table = code.double()
    chosen = table[codes.cpu().long()].view(-1, blocksize)
    report.measure(
        f"{label}: absmax, relative error", float((absmax.cpu().double()[:, None] / scale - 1).abs().max()), 2.0**-23
    )
    # The nearest of 256 sorted values is one of two neighbours.
    right = torch.searchsorted(table, exact / scale).clamp(1, 255)
    nearest = torch.minimum((exact / scale - table[right]).abs(), (exact / scale - table[right - 1]).abs())
    excess = (exact / scale - chosen).abs() - nearest
    report.measure(f"{label}: code beyond the nearest", float(excess.max()), 1e-6)
    got = torch.ops.halfbyte.dequantize_blockwise(codes, absmax, code.to(device), blocksize, torch.float32)
    error = (got.cpu().double().view(-1, blocksize) - chosen * scale) / scale
    report.measure(f"{label}: dequantized", float(error.abs().max()), 2.0**-23)
