"""Activations and weights for LLM.int8(): no value near the middle between two codes, so that codes are certain."""

from __future__ import annotations

import torch

__all__ = ["THRESHOLD", "activations", "int8_weight"]

THRESHOLD = 6.0


def activations(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, outliers: bool = True, seed: int = 0
) -> torch.Tensor:
    """Rows with absmax between 1 and 5 and, if asked, about 1 in 16 values an outlier of up to 40."""
    generator = torch.Generator().manual_seed(seed + 17 * rows + columns)
    codes = torch.randint(-126, 127, (rows, columns), generator=generator).double()
    if columns:
        codes[:, generator.initial_seed() % columns] = 127.0
    noise = torch.rand(rows, columns, generator=generator).double().sub(0.5).mul(0.3)
    noise[codes.abs() == 127] = 0
    absmax = torch.rand(rows, 1, generator=generator).double().mul(4).add(1).to(dtype).double()
    values = (codes + noise) * absmax / 127
    if outliers:
        large = torch.rand(rows, columns, generator=generator) < 1 / 16
        large &= codes.abs() < 127
        sizes = torch.rand(rows, columns, generator=generator).double().mul(34).add(THRESHOLD)
        values = torch.where(large, sizes * codes.sign(), values)
    return values.to(dtype)


def int8_weight(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes over the whole range and fp32 scales of different sizes."""
    generator = torch.Generator().manual_seed(seed + 31 * rows + columns)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator).to(torch.int8)
    return codes, torch.rand(rows, generator=generator).mul(3).sub(4).exp()
