"""Compiling ahead: the kernels that a model's first forward needs, into Triton's cache on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from halfbyte.backends.triton.device import gpu_of
from halfbyte.backends.triton.gemm import gemm_4bit
from halfbyte.backends.triton.quantize import quantize_4bit
from halfbyte.backends.triton.tuning import read

__all__ = ["warmup"]

USUAL = ((4096, 4096), (14336, 4096), (4096, 14336))
"""Shapes (N, K) compiled for where an architecture has no tuning file: those of an 8B model."""

BATCHES = (1, 256)
"""One token, and a prompt long enough for slices of dequantized weight."""


def warmup(say: Callable[[str], None], dtypes: Sequence[torch.dtype]) -> None:
    """Run every kernel of a 4-bit layer once, in every dtype, with plain and nested scales, for the measured shapes.

    Args:
        say: Takes one line of text.
        dtypes: Of activations.
    """
    index = torch.cuda.current_device()
    table = read(gpu_of(index).arch)
    shapes = USUAL if table is None else tuple(sorted({(entry.n, entry.k) for entry in table.entries}))
    device = torch.device("cuda", index)
    code, offset = torch.zeros(256, device=device), torch.zeros((), device=device)
    start, products = time.perf_counter(), 0
    for dtype in dtypes:
        quantize_4bit(torch.zeros(64, 64, dtype=dtype, device=device), 64, "nf4", torch.uint8)
        for n, k in shapes:
            packed = torch.zeros(n * k // 2, 1, dtype=torch.uint8, device=device)
            absmax = torch.zeros(n * k // 64, device=device)
            codes = torch.zeros(n * k // 64, dtype=torch.uint8, device=device)
            for batch in BATCHES:
                x = torch.zeros(batch, k, dtype=dtype, device=device)
                gemm_4bit(x, packed, (n, k), absmax, 64, "nf4")
                gemm_4bit(x, packed, (n, k), absmax, 64, "nf4", None, codes, code, offset)
                products += 2
    torch.cuda.synchronize()
    say(f"triton: {products} products compiled or found in {time.perf_counter() - start:.1f} s")
