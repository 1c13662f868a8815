"""Compiling ahead: the kernels that a model's first forward needs, into Triton's cache on disk."""

from __future__ import annotations

import multiprocessing
import os
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

WORKERS = 8
"""Processes that compile at most: each takes some 400 MB of the GPU and a second to start."""

BATCHES = (1, 8, 32, 64, 256, 2048)
"""One token, decoding of some sequences, and prompts."""


def warmup(say: Callable[[str], None], dtypes: Sequence[torch.dtype], shapes: Sequence[tuple[int, int]] = ()) -> None:
    """Run every kernel of a 4-bit layer once, in every dtype, with plain and nested scales, on this GPU.

    Args:
        say: Takes one line of text.
        dtypes: Of activations.
        shapes: (N, K) of the weights; empty for those that tiles were measured for.
    """
    index = torch.cuda.current_device()
    table = read(gpu_of(index).arch)
    if not shapes:
        shapes = USUAL if table is None else sorted({(entry.n, entry.k) for entry in table.entries})
    jobs = [(dtype, n, k, nested) for dtype in dtypes for n, k in shapes for nested in (False, True)]
    start = time.perf_counter()
    workers = max(1, min(len(jobs), WORKERS, (os.cpu_count() or 2) - 1))
    if workers == 1 or len(jobs) < 4:
        for job in jobs:
            _compile(job)
    else:  # Triton compiles one kernel at a time in a process
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for _ in pool.imap_unordered(_compile, jobs):
                pass
    say(
        f"triton: kernels for {len(jobs)} kinds of weights, up to {BATCHES[-1]} rows, compiled or found in "
        f"{time.perf_counter() - start:.1f} s"
    )


def _compile(job: tuple[torch.dtype, int, int, bool]) -> None:
    """Quantize one weight, and multiply with it at every batch."""
    dtype, n, k, nested = job
    device = torch.device("cuda", torch.cuda.current_device())
    quantize_4bit(torch.zeros(64, 64, dtype=dtype, device=device), 64, "nf4", torch.uint8)
    packed = torch.zeros(n * k // 2, 1, dtype=torch.uint8, device=device)
    count = -(-n * k // 64)
    absmax = torch.zeros(-(-count // 256) if nested else count, device=device)
    scales: tuple[torch.Tensor, ...] = ()
    if nested:
        codes = torch.zeros(count, dtype=torch.uint8, device=device)
        scales = (codes, torch.zeros(256, device=device), torch.zeros((), device=device))
    for batch in BATCHES:
        x = torch.zeros(batch, k, dtype=dtype, device=device)
        gemm_4bit(x, packed, (n, k), absmax, 64, "nf4", None, *scales)
    torch.cuda.synchronize()
