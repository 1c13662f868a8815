"""Codes in the layouts of old 8-bit checkpoints, placed element by element."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["OFFSETS", "stored_as"]

# Offsets as NVIDIA's cuBLASLt reference gives them under cublasLtOrder_t, element by element.
OFFSETS: dict[str, tuple[int, Callable[[int, int], int]]] = {
    "col32": (1, lambda _, c: c % 32),
    "col_turing": (
        8,
        lambda r, c: (r % 2) * 128 + (c % 32) // 4 * 16 + (r % 8) // 2 * 4 + c % 4,
    ),
    "col_ampere": (32, lambda r, c: (((r % 32) % 8 // 2 * 4 + (r % 32) // 8) * 2 + r % 2) * 32 + c % 32),
}


def stored_as(codes: torch.Tensor, name: str) -> torch.Tensor:
    """The codes as bitsandbytes up to 0.44 saved them: whole tiles, padded with zeros, which follow each other down."""
    tile_rows, offset = OFFSETS[name]
    rows, columns = -(-codes.shape[0] // tile_rows) * tile_rows, -(-codes.shape[1] // 32) * 32
    flat = torch.zeros(rows * columns, dtype=torch.int8)
    for r in range(codes.shape[0]):
        for c in range(codes.shape[1]):
            tile = c // 32 * (rows // tile_rows) + r // tile_rows
            flat[tile * tile_rows * 32 + offset(r, c)] = codes[r, c]
    return flat.view(rows, columns)
