"""Measure tiles of the fused 4-bit products on this GPU and write its tuning file.

Run: ``python benchmarks/gpu_tune.py [--shapes 4096x4096,14336x4096] [--out FILE]`` from a source folder. Every tile's
result is compared with the dequantized product first. One architecture takes some minutes on 16 cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import copies_for
from benchmarks.gpu_4bit import graph_time
from halfbyte.backends import registry
from halfbyte.backends.triton.device import gpu_of, rounded_pairs_of, words_of
from halfbyte.backends.triton.gemm import FusedPlan
from halfbyte.backends.triton.tuning import FUSED_BATCHES, Tile

FOLDER = Path(__file__).resolve().parents[1] / "src" / "halfbyte" / "backends" / "triton" / "tuning"
SHAPES = "4096x4096,14336x4096,4096x14336,28672x8192"
ops = torch.ops.halfbyte


def tiles(batch: int, arch: str) -> Iterator[Tile]:
    """What is tried for a batch bucket."""
    if batch <= 16:
        yield from _register_tiles(max(batch, 8))
    if batch > 1:
        yield from _staged_tiles(batch)
    if arch == "sm_90" and batch >= 32:
        yield from _warpgroup_tiles(batch)


def _register_tiles(batch: int) -> Iterator[Tile]:
    for rows, n_warps in ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4)):
        for unroll, k_warps, ahead in itertools.product((2, 4), (2, 4, 8, 16), (1, 2)):
            if k_warps * n_warps <= 16 and k_warps * rows * batch * 4 <= 16384:
                yield Tile("register", batch, rows, unroll, k_warps, n_warps, 1, ahead)


def _staged_tiles(batch: int) -> Iterator[Tile]:
    for rows, k_warps, n_warps in ((64, 1, 4), (32, 2, 2), (128, 1, 8), (64, 1, 2)):
        for unroll, table in itertools.product((1, 2, 4), (True, False)):
            tile = Tile("staged", min(max(batch, 8), 64), rows, unroll, k_warps, n_warps, 1, 3, table)
            yield from _splits(tile, batch)


def _warpgroup_tiles(batch: int) -> Iterator[Tile]:
    for rows, n_warps in ((64, 4), (128, 8)):
        for unroll, stages, table in itertools.product((1, 2, 4), (2, 3), (True, False)):
            yield from _splits(Tile("warpgroup", min(batch, 128), rows, unroll, 1, n_warps, 1, stages, table), batch)


def _splits(tile: Tile, batch: int) -> Iterator[Tile]:
    room = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    fits = tile.shared_bytes() + 32768 * tile.table <= room
    for split in ((1, 2, 4, 8) if batch > 16 else (1,)) if fits else ():
        yield Tile(**{**asdict(tile), "split": split})


def plan_of(m: int, n: int, k: int, tile: Tile) -> FusedPlan:
    """The plan that runs ``tile``."""
    pairs, words = rounded_pairs_of("nf4", torch.bfloat16, 0), words_of("nf4", torch.bfloat16)
    return FusedPlan(m, n, k, 64, pairs, words, tile, k, nested=False, bias=False)


def compile_share(worker: int, workers: int, shapes: list[tuple[int, int]], arch: str) -> None:
    """Compile this worker's share of all tiles by running each once."""
    jobs = [(m, n, k, tile) for m in FUSED_BATCHES for tile in tiles(m, arch) for n, k in shapes]
    for m, n, k, tile in jobs[worker::workers]:
        packed = torch.zeros(n * k // 2, 1, dtype=torch.uint8, device="cuda")
        x, out = (torch.zeros(m, width, dtype=torch.bfloat16, device="cuda") for width in (k, n))
        absmax = torch.zeros(n * k // 64, device="cuda")
        plan_of(m, n, k, tile).run(x, packed, absmax, (None, None, None), None, out, 0)


def best(m: int, n: int, k: int, arch: str) -> dict[str, Any]:
    """The table's entry for one batch bucket and shape."""
    copies = copies_for(n * k // 2)
    weights = [
        ops.quantize_4bit(torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02, 64, "nf4", torch.uint8)
        for _ in range(copies)
    ]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    want = F.linear(x, ops.dequantize_4bit(*weights[0], 64, "nf4", [n, k], torch.bfloat16)).float()
    found: tuple[float, Tile | None] = (math.inf, None)
    for tile in tiles(m, arch):
        if tile.split > 1 and -(-n // tile.rows) * tile.split > 4 * gpu_of(0).multiprocessors:
            continue
        out = torch.full((m, n), math.nan, device="cuda", dtype=torch.bfloat16)
        plan = plan_of(m, n, k, tile)
        plan.run(x, *weights[0], (None, None, None), None, out, 0)
        error = ((out.float() - want).norm() / want.norm()).item()
        if not error < 5e-3:
            raise SystemExit(f"wrong result: relative error {error} of {tile} for {m} rows, {n}x{k}")
        calls = [lambda w=w, p=plan, o=out: p.run(x, *w, (None, None, None), None, o, 0) for w in weights]
        found = min(found, (graph_time(calls, 5), tile), key=lambda pair: pair[0])
    taken, tile = found
    print(f"{n}x{k} {m}: {taken:.2f} us {tile}", flush=True)
    return {"batch": m, "n": n, "k": k, "tile": asdict(tile) if tile else {}}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    registry.explain("gemm_4bit", torch.zeros(1, device="cuda"))
    arch = gpu_of(0).arch
    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in arguments.shapes.split(","))]
    workers = max(1, min(14, multiprocessing.cpu_count() - 1))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(compile_share, [(i, workers, shapes, arch) for i in range(workers)])
    entries = [best(m, n, k, arch) for m in FUSED_BATCHES for n, k in shapes]
    document = {
        "arch": arch,
        "device": torch.cuda.get_device_name(),
        "measured": "CUDA graphs, rotated weights, NF4 blocks of 64, bf16",
        "tiles": entries,
        "fused": [{"n": n, "k": k, "up_to": 128} for n, k in shapes],
    }
    out = arguments.out or FOLDER / f"{arch}.json"
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
