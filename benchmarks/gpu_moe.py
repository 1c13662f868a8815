"""Products of mixture-of-experts layers on a GPU: one grouped launch, a loop over experts, bf16 grouped_mm, the floor.

Run: ``python benchmarks/gpu_moe.py [--out FOLDER] [--seconds N] [--tiles]`` from a source folder. Every product is
checked against float64 before it is timed. Times are CUDA-graph replays over weights that rotate past the level-2
cache, medians, in microseconds. ``--tiles`` measures tiles instead.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import COLD_BYTES, write_csv
from benchmarks.gpu_4bit import BANDWIDTH, eager_time, graph_time
from halfbyte.backends.triton import grouped
from halfbyte.backends.triton.device import rounded_pairs_of
from halfbyte.backends.triton.grouped_tiles import GroupedTile
from halfbyte.functional import quantize_4bit

LAYERS = {
    "Mixtral gate_up": (8, 2, 28672, 4096),
    "Mixtral down": (8, 2, 4096, 14336),
    "Qwen3 gate_up": (128, 8, 1536, 2048),
    "Qwen3 down": (128, 8, 2048, 768),
}
"""Name -> experts, of which chosen, rows, columns."""
TOKENS = (1, 4, 8, 16, 64, 256, 2048)
ops = torch.ops.halfbyte


class Layer:
    """One projection and one routing of a batch of tokens."""

    def __init__(self, count: int, chosen: int, n: int, k: int, tokens: int, seed: int = 0) -> None:
        self.count, self.chosen, self.n, self.k = count, chosen, n, k
        generator = torch.Generator(device="cuda").manual_seed(tokens + 1000 * seed)
        self.x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16, generator=generator)
        scores = torch.rand(tokens, count, device="cuda", generator=generator)
        self.experts = scores.topk(chosen, dim=1).indices
        self.order, self.ends = ops.group_rows(self.experts, count)
        self.ends_list = self.ends.tolist()
        self.gathered = self.x[self.order.long() // chosen]
        self.touched = int(self.experts.unique().numel())

    @property
    def nbytes(self) -> float:
        """Packed bytes and scales of the touched experts."""
        return self.touched * self.n * self.k * (1 / 2 + 1 / 16)

    def product(self, packed: Tensor, absmax: Tensor) -> Tensor:
        """The grouped launch."""
        shape = [self.count, self.n, self.k]
        return ops.gemm_4bit_grouped(self.x, packed, shape, self.order, self.ends, absmax, 64, "nf4")

    def backward(self, grad: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
        """The gradient to the activation, before the sum over a token's experts."""
        shape = [self.count, self.n, self.k]
        return ops.gemm_4bit_grouped(grad, packed, shape, self.order, self.ends, absmax, 64, "nf4", True)

    def loop(self, packed: Tensor, absmax: Tensor) -> list[Tensor]:
        """Our own 4-bit product once for each touched expert, over rows gathered before."""
        size, first, out = self.n * self.k, 0, []
        for e, end in enumerate(self.ends_list):
            if end > first:
                codes, scales = packed[e * size // 2 : (e + 1) * size // 2], absmax[e * size // 64 :][: size // 64]
                out.append(ops.gemm_4bit(self.gathered[first:end], codes, [self.n, self.k], scales, 64, "nf4"))
            first = end
        return out


def routings(count: int, chosen: int, n: int, k: int, tokens: int) -> list[Layer]:
    """Routings that together touch more weights than the level-2 cache holds, so that every call reads from memory."""
    first = Layer(count, chosen, n, k, tokens)
    calls = min(32, max(8, math.ceil(COLD_BYTES / first.nbytes)))  # eight at least: starting a graph takes time, too
    return [first, *[Layer(count, chosen, n, k, tokens, seed) for seed in range(1, calls)]]


def weights(count: int, n: int, k: int, copies: int) -> list[tuple[Tensor, Tensor]]:
    """Packed codes and absmax, ``copies`` times."""
    weight = torch.randn(count, n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    codes, state = quantize_4bit(weight, quant_type="nf4")
    return [(codes, state.absmax), *[(codes.clone(), state.absmax.clone()) for _ in range(copies - 1)]]


def check(layer: Layer, packed: Tensor, absmax: Tensor, result: Tensor) -> float:
    """Relative error against float64 of up to 16 products.

    Raises:
        SystemExit: Larger than a 16-bit product may have.
    """
    flat, size, worst = layer.experts.reshape(-1), layer.n * layer.k, 0.0
    some = torch.linspace(0, result.shape[0] - 1, min(16, result.shape[0]), device="cuda").long().unique()
    for s in some.tolist():
        e = int(flat[s])
        codes, scales = packed[e * size // 2 : (e + 1) * size // 2], absmax[e * size // 64 : (e + 1) * size // 64]
        weight = ops.dequantize_4bit(codes, scales, 64, "nf4", [layer.n, layer.k], torch.float32)
        exact = weight.double() @ layer.x[s // layer.chosen].double()
        worst = max(worst, ((result[s].double() - exact).norm() / exact.norm()).item())
    if not worst < 5e-3:
        raise SystemExit(f"wrong result, nothing is timed: relative error {worst}")
    return worst


CANDIDATES = (
    (8, 16, 4, 4, 1, 1), (8, 32, 4, 2, 2, 1), (8, 64, 4, 2, 4, 1), (8, 32, 2, 2, 2, 1),
    (16, 32, 2, 4, 1, 1), (16, 32, 4, 2, 2, 1), (16, 64, 2, 2, 4, 1), (16, 64, 4, 1, 4, 1),
    (32, 32, 2, 4, 2, 0), (32, 64, 2, 2, 4, 0), (32, 64, 4, 1, 4, 0), (32, 128, 2, 1, 8, 0),
    (16, 64, 4, 1, 4, 1, True), (32, 64, 2, 2, 4, 1, True), (32, 64, 4, 1, 4, 1, True), (32, 128, 2, 1, 8, 0, True),
)  # fmt: skip
"""Tiles that ``--tiles`` measures: batch, rows, unroll, k_warps, n_warps, ahead, halves."""


def variants(each: float, k: int) -> list[GroupedTile]:
    """Tiles worth measuring for ``each`` rows an expert on average and K columns."""
    tiles = [GroupedTile(*numbers) for numbers in CANDIDATES]
    fits = [tile for tile in tiles if k // 64 >= tile.k_warps * tile.unroll]
    return [tile for tile in fits if (each <= 16 if tile.batch == 8 else each >= tile.batch / 8)]


def compile_ahead(worker: int, workers: int, tiles: bool) -> None:
    """Compile this worker's share of the kernels into Triton's cache."""
    jobs: list[tuple[tuple[int, int, int, int], Any]] = []
    for layer in LAYERS.values():
        if not tiles:
            jobs += [(layer, tokens) for tokens in TOKENS]
            continue
        eaches = [tokens * layer[1] / layer[0] for tokens in TOKENS]
        found = {tile for each in eaches for tile in variants(each, layer[3])}
        jobs += [(layer, tile) for tile in sorted(found, key=str)]
    for (count, chosen, n, k), job in jobs[worker::workers]:
        packed = torch.zeros(count * n * k // 2, 1, dtype=torch.uint8, device="cuda")
        absmax = torch.zeros(count * n * k // 64, device="cuda")
        if isinstance(job, GroupedTile):
            run_tile(job, Layer(count, chosen, n, k, 4), packed, absmax)
        else:
            layer = Layer(count, chosen, n, k, job)
            layer.product(packed, absmax)
            layer.loop(packed, absmax)
            if job >= 256:
                grads = torch.zeros(layer.order.numel(), n, device="cuda", dtype=torch.bfloat16)
                layer.backward(grads, packed, absmax)


def run_tile(tile: GroupedTile, layer: Layer, packed: Tensor, absmax: Tensor) -> Tensor:
    """The grouped launch with that tile."""
    rows = layer.order.numel()
    out = torch.empty(rows, layer.n, dtype=layer.x.dtype, device="cuda")
    key = (tile, rows, layer.n, layer.k, layer.chosen)
    if key not in _plans:
        _plans[key] = grouped.GroupedPlan(
            tile, rows, layer.count, layer.n, layer.k, x_stride=layer.k, repeat=layer.chosen, blocksize=64,
            pairs=rounded_pairs_of("nf4", layer.x.dtype, 0), nested=False, bias=False,
        )  # fmt: skip
    _plans[key].run(layer.x, packed, absmax, (None, None, None), layer.order, layer.ends, None, out)
    return out


_plans: dict[Any, grouped.GroupedPlan] = {}


def tiles(deadline: float, out: Path) -> None:
    """Times of every variant, the best first."""
    rows: list[dict[str, Any]] = []
    for name, (count, chosen, n, k) in LAYERS.items():
        stored = weights(count, n, k, 2)
        for tokens in TOKENS:
            layers = routings(count, chosen, n, k, tokens)
            floor = sum(layer.nbytes for layer in layers) / len(layers) / BANDWIDTH
            here: list[dict[str, Any]] = []
            for tile in variants(tokens * chosen / count, k):
                if time.monotonic() > deadline:
                    break
                check(layers[0], *stored[0], run_tile(tile, layers[0], *stored[0]))
                calls = [partial(run_tile, tile, layer, *stored[i % 2]) for i, layer in enumerate(layers)]
                here.append({"layer": name, "tokens": tokens, "floor": floor, "us": graph_time(calls, 3), **vars(tile)})
            here.sort(key=lambda row: row["us"])
            rows += here
            for row in here[:4]:
                print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            if rows:
                write_csv("gpu_moe_tiles.csv", rows, out)


def _in_order() -> Iterator[tuple[tuple[str, tuple[int, int, int, int]], tuple[int, ...]]]:
    for batches in (TOKENS[:5], TOKENS[5:]):
        for layer in LAYERS.items():
            yield layer, batches


def products(deadline: float, out: Path) -> None:
    """One row for each layer and batch."""
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    rows: list[dict[str, Any]] = []
    # Small batches first: should time run out, these are the ones that matter most.
    for (name, (count, chosen, n, k)), batches in _in_order():
        stored = weights(count, n, k, 2)
        dense = [torch.randn(count, n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(2)]
        for tokens in batches:
            if time.monotonic() > deadline:
                print("out of time at", name, tokens, flush=True)
                return
            layers = routings(count, chosen, n, k, tokens)
            error = check(layers[0], *stored[0], layers[0].product(*stored[0]))
            pairs = [(layer, stored[i % 2], dense[i % 2].transpose(1, 2)) for i, layer in enumerate(layers)]
            calls: dict[str, list[Callable[[], Any]]] = {
                "grouped": [partial(layer.product, *w) for layer, w, _ in pairs],
                "sort": [partial(ops.group_rows, layer.experts, count) for layer, _, _ in pairs],
                "loop": [partial(layer.loop, *w) for layer, w, _ in pairs],
                "bf16_grouped_mm": [partial(grouped_mm, la.gathered, d, offs=la.ends) for la, _, d in pairs],
            }
            times = {key: round(graph_time(value, 5), 2) for key, value in calls.items()}
            if tokens >= 256:
                grads = torch.randn(layers[0].order.numel(), n, device="cuda", dtype=torch.bfloat16)
                back: list[Callable[[], Any]] = [partial(layer.backward, grads, *w) for layer, w, _ in pairs]
                times["backward"] = round(graph_time(back, 5), 2)
                dense_back: list[Callable[[], Any]] = [
                    partial(grouped_mm, grads, d.transpose(1, 2), offs=layer.ends) for layer, _, d in pairs
                ]
                times["bf16_backward"] = round(graph_time(dense_back, 5), 2)
            host = eager_time(calls["grouped"][0], 50)
            floor = sum(layer.nbytes for layer in layers) / len(layers) / BANDWIDTH
            row = {
                "layer": name, "experts": count, "chosen": chosen, "n": n, "k": k, "tokens": tokens,
                "touched": round(sum(layer.touched for layer in layers) / len(layers), 1), "floor": round(floor, 2),
                "backward": "", "bf16_backward": "", **times, "host": round(host, 1), "error": f"{error:.1e}",
            }  # fmt: skip
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            write_csv("gpu_moe.csv", rows, out)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--compiled", action="store_true", help="all kernels are in Triton's cache already")
    parser.add_argument("--tiles", action="store_true", help="measure tiles instead")
    parsed = parser.parse_args()
    deadline = time.monotonic() + parsed.seconds
    workers = 0 if parsed.compiled else 14
    spawn = multiprocessing.get_context("spawn")
    ahead = [spawn.Process(target=compile_ahead, args=(worker, workers, parsed.tiles)) for worker in range(workers)]
    for process in ahead:
        process.start()
    for process in ahead:
        process.join(max(0.1, deadline - time.monotonic() - parsed.seconds / 2))
        process.kill()
    print("compiled,", round(deadline - time.monotonic(), 1), "s left", flush=True)
    (tiles if parsed.tiles else products)(deadline, parsed.out)


if __name__ == "__main__":
    main()
