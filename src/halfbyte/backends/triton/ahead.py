"""Compiling ahead: the kernels that a model's first forward needs, into Triton's cache on disk."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.backends.triton.blockwise import quantize_blockwise
from halfbyte.backends.triton.device import dynamic_maps_of, gpu_of
from halfbyte.backends.triton.gemm import gemm_4bit
from halfbyte.backends.triton.grouped import gemm_4bit_grouped, group_rows
from halfbyte.backends.triton.grouped_tiles import SLICED_FROM
from halfbyte.backends.triton.quantize import quantize_4bit
from halfbyte.backends.triton.tuning import read
from halfbyte.formats.blocks import NESTED_BLOCKSIZE

__all__ = ["warmup"]

USUAL = ((4096, 4096), (14336, 4096), (4096, 14336))
"""Shapes (N, K) compiled for where an architecture has no tuning file: those of an 8B model."""

WORKERS = 8
"""Processes that compile at most: each takes some 400 MB of the GPU and a second to start."""

BATCHES = (1, 8, 32, 64, 128, 256, 2048)
"""One token, decoding of some sequences, and prompts."""

EXPERT_TOKENS = (1, 8, 32, 128, 512)
"""Tokens of a batch that layers with experts are compiled for: beyond, weights are dequantized for torch's product."""

Job = tuple[Callable[..., None], tuple[Any, ...]]


def warmup(
    say: Callable[[str], None],
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, int]] = (),
    experts: Sequence[tuple[int, int, int, int, bool]] = (),
) -> None:
    """Run every kernel of a 4-bit layer once, in every dtype, with plain and nested scales, on this GPU.

    Args:
        say: Takes one line of text.
        dtypes: Of activations.
        shapes: (N, K) of the weights; empty for those that tiles were measured for.
        experts: Experts, chosen of them, N, K, and whether there is a bias, of stacked weights.
    """
    index = torch.cuda.current_device()
    table = read(gpu_of(index).arch)
    if not shapes:
        shapes = USUAL if table is None else sorted({(entry.n, entry.k) for entry in table.entries})
    jobs: list[Job] = [(_loading, (dtype,)) for dtype in dtypes]
    for nested in (False, True):
        jobs += [(_weight, (dtype, n, k, nested)) for dtype in dtypes for n, k in shapes]
        jobs += [(_experts, (dtype, *stack, nested)) for dtype in dtypes for stack in experts]
    start = time.perf_counter()
    workers = max(1, min(len(jobs), WORKERS, (os.cpu_count() or 2) - 1))
    if workers == 1 or len(jobs) < 6:
        for job in jobs:
            _run(job)
    else:  # Triton compiles one kernel at a time in a process
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for _ in pool.imap_unordered(_run, jobs):
                pass
    say(
        f"triton: kernels for {len(jobs) - len(dtypes)} kinds of weights, up to {BATCHES[-1]} rows, compiled or found "
        f"in {time.perf_counter() - start:.1f} s"
    )


def _run(job: Job) -> None:
    compile_one, arguments = job
    compile_one(*arguments)
    torch.cuda.synchronize()


def _loading(dtype: torch.dtype) -> None:
    """Quantize, with the scales quantized again."""
    device = torch.device("cuda", torch.cuda.current_device())
    _, absmax = quantize_4bit(torch.zeros(512, 512, dtype=dtype, device=device), 64, "nf4", torch.uint8)
    quantize_blockwise(absmax, dynamic_maps_of(device.index)[0], NESTED_BLOCKSIZE)


def _scales(count: int, nested: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """absmax, and what decodes it."""
    device = torch.device("cuda", torch.cuda.current_device())
    absmax = torch.zeros(-(-count // NESTED_BLOCKSIZE) if nested else count, device=device)
    if not nested:
        return absmax, ()
    codes = torch.zeros(count, dtype=torch.uint8, device=device)
    return absmax, (codes, torch.zeros(256, device=device), torch.zeros((), device=device))


def _weight(dtype: torch.dtype, n: int, k: int, nested: bool) -> None:
    """Multiply with one weight at every batch."""
    device = torch.device("cuda", torch.cuda.current_device())
    packed = torch.zeros(n * k // 2, 1, dtype=torch.uint8, device=device)
    absmax, second = _scales(-(-n * k // 64), nested)
    for batch in BATCHES:
        x = torch.zeros(batch, k, dtype=dtype, device=device)
        gemm_4bit(x, packed, (n, k), absmax, 64, "nf4", None, *second)


def _experts(dtype: torch.dtype, count: int, chosen: int, n: int, k: int, bias: bool, nested: bool) -> None:
    """Multiply with stacked weights, of which every row takes the first: the only one that has memory here."""
    device = torch.device("cuda", torch.cuda.current_device())
    packed = torch.zeros(n * k // 2, 1, dtype=torch.uint8, device=device)
    absmax, second = _scales(-(-n * k // 64), nested)
    added = torch.zeros(count, n, dtype=dtype, device=device) if bias else None
    for tokens in EXPERT_TOKENS:
        rows = tokens * chosen
        if rows > SLICED_FROM[True] * count:
            break
        x = torch.zeros(rows, k, dtype=dtype, device=device)
        order, ends = group_rows(torch.zeros(tokens, chosen, dtype=torch.int64, device=device), count)
        gemm_4bit_grouped(x, packed, (count, n, k), order, ends, absmax, 64, "nf4", False, added, *second)
