"""Measuring tiles of the fused 4-bit products on a GPU: what its tuning file is made from."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.backends.triton import slices
from halfbyte.backends.triton.decoded import DecodedPlan, decoded_kernel
from halfbyte.backends.triton.dequantize import dequantize_4bit
from halfbyte.backends.triton.device import gpu_of, rounded_pairs_of, words_of
from halfbyte.backends.triton.gemm import FusedPlan
from halfbyte.backends.triton.quantize import quantize_4bit
from halfbyte.backends.triton.tuning import FUSED_BATCHES, Tile
from halfbyte.errors import ArgumentError, UnsupportedError

__all__ = ["FUSED_BATCHES", "SHAPES", "candidates", "graph_time", "tune"]

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
"""Shapes (N, K) that are measured unless others are asked for: the linear layers of an 8B and of a 70B model."""

BLOCKSIZE, KIND, DTYPE = 64, "nf4", torch.bfloat16
COLD_BYTES = 200 << 20
"""Weights rotate over at least this much memory, so that they come from memory as in a model, not from a cache."""

WORST_ERROR = 5e-3
"""Relative, against the dequantized product in the same dtype: rounding alone stays below half of it."""

TABLE_BYTES = 32768
Tick = Callable[[str], None]


def candidates(batch: int, arch: str, shared_bytes: int) -> Iterator[Tile]:
    """The tiles that are tried for a batch bucket on an architecture with that much shared memory a program.

    >>> sorted({tile.kind for tile in candidates(32, "sm_89", 99 << 10)})
    ['staged']
    """
    tiles: Iterable[Tile] = ()
    if batch <= 16:
        tiles = itertools.chain(tiles, _register_tiles(max(batch, 8)))
    if batch > 1:
        tiles = itertools.chain(tiles, _staged_tiles(batch))
    if arch == "sm_90" and batch >= 32:
        tiles = itertools.chain(tiles, _warpgroup_tiles(batch), _decoded_tiles(batch))
    for tile in tiles:
        table = TABLE_BYTES if tile.kind in ("staged", "warpgroup") and tile.table else 0
        if tile.kind == "register" or tile.shared_bytes() + table <= shared_bytes:
            yield tile


def _register_tiles(batch: int) -> Iterator[Tile]:
    for rows, n_warps in ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4)):
        for unroll, k_warps, ahead in itertools.product((2, 4), (2, 4, 8, 16), (1, 2)):
            if k_warps * n_warps <= 16 and k_warps * rows * batch * 4 <= 16384:
                yield Tile("register", batch, rows, unroll, k_warps, n_warps, 1, ahead)


def _staged_tiles(batch: int) -> Iterator[Tile]:
    for rows, k_warps, n_warps in ((64, 1, 4), (32, 2, 2), (128, 1, 8), (64, 1, 2)):
        for unroll, table in itertools.product((1, 2, 4), (True, False)):
            yield from _splits(
                Tile("staged", min(max(batch, 8), 64), rows, unroll, k_warps, n_warps, 1, 3, table), batch
            )


def _warpgroup_tiles(batch: int) -> Iterator[Tile]:
    for rows, n_warps in ((64, 4), (128, 8)):
        for unroll, stages, table in itertools.product((1, 2, 4), (2, 3), (True, False)):
            yield from _splits(Tile("warpgroup", min(batch, 128), rows, unroll, 1, n_warps, 1, stages, table), batch)


def _decoded_tiles(batch: int) -> Iterator[Tile]:
    if decoded_kernel() is None:
        return
    rows = min(batch, 256)
    if rows >= 256:
        yield from _splits(Tile("decoded", rows, 128, 4, 1, 8, 1, 4, table=False), batch)
    else:
        warps = 8 if rows == 128 else 4
        yield from _splits(Tile("decoded", rows, 128, 2, 1, warps, 1, 6, table=False, producers=2), batch)


def _splits(tile: Tile, batch: int) -> Iterator[Tile]:
    for split in (1, 2, 4, 8) if batch > 16 else (1,):
        yield replace(tile, split=split)


def graph_time(calls: Sequence[Callable[[], Any]], repeats: int = 5) -> float:
    """Median microseconds of one of ``calls``, replayed together as a CUDA graph."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    taken: list[float] = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return sorted(taken)[len(taken) // 2]


def tune(
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    workers: int,
    expect: Callable[[int], None],
    tick: Tick,
) -> dict[str, Any]:
    """Measure every tile on the current GPU.

    Args:
        shapes: (N, K) of weights.
        batches: Rows of activations, of :data:`tuning.FUSED_BATCHES`.
        workers: Processes that compile.
        expect: Told once how many ticks follow.
        tick: Told of every tile that was compiled, and of every bucket that was measured.

    Returns:
        The tuning file's document. Up to which batch the fused kernels are faster than slices is in it where all
        batches were measured.

    Raises:
        ArgumentError: A batch that has no tiles of its own.
        UnsupportedError: The fused kernels do not run on this GPU, or one computes a wrong product.
    """
    for batch in batches:
        if batch not in FUSED_BATCHES:
            expected = ", ".join(map(str, FUSED_BATCHES))
            raise ArgumentError(f"there are no tiles for {batch} rows", expected=f"one of {expected}")
    gpu, room = gpu_of(torch.cuda.current_device()), _shared_bytes()
    if not gpu.gluon:
        raise UnsupportedError(
            f"{torch.cuda.get_device_name()} has no fused kernels to tune", expected="an NVIDIA GPU, sm_80 or later"
        )
    jobs = [(m, n, k, t) for m in batches for t in candidates(m, gpu.arch, room) for n, k in shapes]
    buckets = [(m, n, k) for n, k in shapes for m in sorted(set(batches))]
    expect(len(jobs) + len(buckets))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in pool.imap_unordered(_compile, jobs, chunksize=4):
            tick("compiling")
    entries: list[dict[str, Any]] = []
    limits: dict[tuple[int, int], int] = {}
    for m, n, k in buckets:
        taken, tile, sliced = _best(m, n, k, gpu.arch, room, 4 * gpu.multiprocessors)
        entries.append({"batch": m, "n": n, "k": k, "tile": asdict(tile)})
        if taken <= sliced:
            limits[n, k] = m
        tick(f"{n}x{k}, {m} rows: {taken:.1f} µs")
    if set(batches) != set(FUSED_BATCHES):
        limits = {}
    return {
        "arch": gpu.arch,
        "device": torch.cuda.get_device_name(),
        "measured": f"CUDA graphs, rotated weights, {KIND} blocks of {BLOCKSIZE}, bf16",
        "tiles": entries,
        "fused": [{"n": n, "k": k, "up_to": limit} for (n, k), limit in limits.items()],
    }


def _shared_bytes() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_block_optin)


def _plan(m: int, n: int, k: int, tile: Tile) -> FusedPlan | DecodedPlan:
    if tile.kind == "decoded":
        return DecodedPlan(m, n, k, BLOCKSIZE, KIND, tile, across=False, nested=False, bias=False)
    pairs, words = rounded_pairs_of(KIND, DTYPE, torch.cuda.current_device()), words_of(KIND, DTYPE)
    return FusedPlan(m, n, k, BLOCKSIZE, pairs, words, tile, k, nested=False, bias=False)


def _run(plan: FusedPlan | DecodedPlan, x: Tensor, weight: tuple[Tensor, Tensor], out: Tensor) -> None:
    plan.run(x, *weight, (None, None, None), None, out, torch.cuda.current_device())


def _compile(job: tuple[int, int, int, Tile]) -> None:
    """Compile a tile's kernel into Triton's cache on disk, in a process of the pool."""
    m, n, k, tile = job
    packed = torch.zeros(n * k // 2, 1, dtype=torch.uint8, device="cuda")
    x, out = (torch.zeros(m, width, dtype=DTYPE, device="cuda") for width in (k, n))
    _run(_plan(m, n, k, tile), x, (packed, torch.zeros(n * k // BLOCKSIZE, device="cuda")), out)


def _best(m: int, n: int, k: int, arch: str, room: int, most: int) -> tuple[float, Tile, float]:
    """Microseconds of the fastest tile for a bucket at one shape, that tile, and microseconds of slices."""
    copies = max(2, -(-COLD_BYTES // (n * k // 2)))
    weights = [
        quantize_4bit(torch.randn(n, k, device="cuda", dtype=DTYPE) * 0.02, BLOCKSIZE, KIND, torch.uint8)
        for _ in range(copies)
    ]
    x = torch.randn(m, k, device="cuda", dtype=DTYPE)
    want = F.linear(x, dequantize_4bit(*weights[0], BLOCKSIZE, KIND, [n, k], DTYPE)).float()
    found: tuple[float, Tile] | None = None
    for tile in candidates(m, arch, room):
        if tile.split > 1 and -(-n // tile.rows) * tile.split > most:
            continue
        out = torch.full((m, n), math.nan, device="cuda", dtype=DTYPE)
        plan = _plan(m, n, k, tile)
        _run(plan, x, weights[0], out)
        error = ((out.float() - want).norm() / want.norm()).item()
        if not error < WORST_ERROR:
            raise UnsupportedError(
                f"{tile} computes {m} rows times {n}x{k} with a relative error of {error:.3g}",
                expected=f"less than {WORST_ERROR}",
                hint="run: halfbyte doctor",
            )
        taken = graph_time([lambda w=w, p=plan, o=out: _run(p, x, w, o) for w in weights])
        if found is None or taken < found[0]:
            found = (taken, tile)
    if found is None:
        raise UnsupportedError(f"no tile for {m} rows fits the shared memory of {arch}", hint="run: halfbyte doctor")
    out = torch.empty((m, n), device="cuda", dtype=DTYPE)
    nested = (None, None, None)
    calls = [lambda p=p, a=a: slices.forward(x, p, a, nested, BLOCKSIZE, KIND, None, out) for p, a in weights]
    return (*found, graph_time(calls))
