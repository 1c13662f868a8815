"""Products of mixture-of-experts layers on a GPU: one grouped launch, a loop over experts, bf16 grouped_mm, the floor.

Run: ``python benchmarks/gpu_moe.py [--out FOLDER] [--seconds N] [--tiles]`` from a source folder. Every product is
checked against float64 before it is timed. Times are CUDA-graph replays over weights that rotate past the level-2
cache, medians, in microseconds. ``--tiles`` measures every tile variant instead.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_csv
from benchmarks.gpu_4bit import BANDWIDTH, graph_time
from halfbyte.backends.triton import grouped
from halfbyte.backends.triton.device import gpu_of, rounded_pairs_of
from halfbyte.backends.triton.grouped_tiles import GroupedTile, tile_for
from halfbyte.functional import quantize_4bit

LAYERS = {
    "Mixtral gate_up": (8, 2, 28672, 4096),
    "Mixtral down": (8, 2, 4096, 14336),
    "Qwen3 gate_up": (128, 8, 1536, 2048),
    "Qwen3 down": (128, 8, 2048, 768),
}
"""Name -> experts, of which chosen, rows, columns."""
TOKENS = (1, 4, 8, 16, 64, 256)
ops = torch.ops.halfbyte


class Layer:
    """Weights of one projection, as often as it takes to leave the cache, and one routing for each batch."""

    def __init__(self, count: int, chosen: int, n: int, k: int, tokens: int) -> None:
        self.count, self.chosen, self.n, self.k = count, chosen, n, k
        generator = torch.Generator(device="cuda").manual_seed(tokens)
        self.x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16, generator=generator)
        scores = torch.rand(tokens, count, device="cuda", generator=generator)
        self.experts = scores.topk(chosen, dim=1).indices
        self.order, self.ends = ops.group_rows(self.experts, count)
        self.touched = int(self.experts.unique().numel())

    def floor(self) -> float:
        """Microseconds that reading the packed bytes and scales of the touched experts takes at least."""
        return self.touched * self.n * self.k * (1 / 2 + 1 / 16) / BANDWIDTH


def weights(count: int, n: int, k: int, copies: int) -> list[tuple[Tensor, Tensor]]:
    weight = torch.randn(count, n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    made = [quantize_4bit(weight, quant_type="nf4")]
    first = (made[0][0], made[0][1].absmax)
    return [first, *[(first[0].clone(), first[1].clone()) for _ in range(copies - 1)]]


def check(layer: Layer, packed: Tensor, absmax: Tensor, result: Tensor) -> float:
    """Relative error against float64 of up to 64 products."""
    some = torch.linspace(0, result.shape[0] - 1, min(64, result.shape[0]), device="cuda").long().unique()
    flat = layer.experts.reshape(-1)
    size = layer.n * layer.k
    worst = 0.0
    for s in some.tolist()[:16]:
        e = int(flat[s])
        codes, scales = packed[e * size // 2 : (e + 1) * size // 2], absmax[e * size // 64 : (e + 1) * size // 64]
        weight = ops.dequantize_4bit(codes, scales, 64, "nf4", [layer.n, layer.k], torch.float32)
        exact = weight.double() @ layer.x[s // layer.chosen].double()
        worst = max(worst, ((result[s].double() - exact).norm() / exact.norm()).item())
    if not worst < 5e-3:
        raise SystemExit(f"wrong result, nothing is timed: relative error {worst}")
    return worst


def variants() -> list[GroupedTile]:
    """Tiles to measure."""
    found: list[GroupedTile] = []
    for batch, rows, unroll, k_warps, n_warps, ahead in itertools.product(
        (8, 16, 32), (16, 32, 64), (2, 4), (2, 4, 8), (1, 2, 4), (0, 1)
    ):
        if rows % (16 * n_warps) or not 4 <= k_warps * n_warps <= 8 or (batch == 32 and ahead):
            continue
        if rows // n_warps > 32 or (batch == 32 and rows // n_warps > 16) or (batch == 8 and unroll == 2):
            continue
        found.append(GroupedTile(batch, rows, unroll, k_warps, n_warps, ahead))
    return found


def run_tile(tile: GroupedTile, layer: Layer, packed: Tensor, absmax: Tensor) -> Tensor:
    rows = layer.order.numel()
    out = torch.empty(rows, layer.n, dtype=layer.x.dtype, device="cuda")
    pairs = rounded_pairs_of("nf4", layer.x.dtype, 0)
    none = (None, None, None)
    grouped.launch(
        tile, layer.x, packed, absmax, none, layer.order, layer.ends, None, out, pairs, layer.count, layer.chosen, 64
    )
    return out


def tiles(deadline: float, out: Path) -> None:
    """Times of every variant, the best first."""
    rows: list[dict[str, Any]] = []
    for name, (count, chosen, n, k) in LAYERS.items():
        copies = 2
        stored = weights(count, n, k, copies)
        for tokens in TOKENS[:5]:
            layer = Layer(count, chosen, n, k, tokens)
            each = tokens * chosen / count
            here: list[dict[str, Any]] = []
            for tile in variants():
                if time.monotonic() > deadline:
                    break
                if (tile.batch == 8 and each > 24) or (tile.batch > 8 and each < 2) or (tile.batch == 32 and each < 6):
                    continue
                if k // 64 < tile.k_warps * tile.unroll:
                    continue
                try:
                    check(layer, *stored[0], run_tile(tile, layer, *stored[0]))
                    taken = graph_time([lambda c=c, t=tile, la=layer: run_tile(t, la, *c) for c in stored], 3)
                except Exception as error:
                    print("FAILED", tile, repr(error)[:200], flush=True)
                    continue
                here.append({"layer": name, "tokens": tokens, "floor": layer.floor(), "us": taken, **vars(tile)})
            here.sort(key=lambda row: row["us"])
            rows += here
            for row in here[:4]:
                print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            if rows:
                write_csv("gpu_moe_tiles.csv", rows, out)


def compile_ahead() -> None:
    """Compile the variants side by side."""
    jobs = [(tile, layer) for tile in variants() for layer in LAYERS.values()]

    def one(job: Any) -> None:
        tile, (count, chosen, n, k) = job
        layer = Layer(count, chosen, 64, k, 2)
        layer.n = n
        packed = torch.zeros(count * 2, dtype=torch.uint8, device="cuda")
        if k // 64 < tile.k_warps * tile.unroll:
            return
        groups = k // 64
        per_slice = -(-groups // (tile.k_warps * tile.unroll)) * tile.unroll
        pairs = rounded_pairs_of("nf4", torch.bfloat16, 0)
        import triton

        grouped.fused_kernel().warmup(
            packed, layer.x, layer.order, layer.ends, pairs.view(torch.float32), None, None, None, None, layer.x,
            pairs, 2 * chosen, count, chosen, n, k // 8, k // 64, k, groups, per_slice,
            triton.next_power_of_2(max(32, count + 1)), tile.rows, tile.batch, 2, tile.unroll, 1, 1, tile.k_warps,
            tile.n_warps, groups == per_slice * tile.k_warps, False, False, tile.ahead,
            num_warps=tile.k_warps * tile.n_warps, grid=(1, 1),
        )  # fmt: skip

    with ThreadPoolExecutor(8) as pool:
        for done in pool.map(one, jobs):
            del done


def loop(layer: Layer, packed: Tensor, absmax: Tensor, ends: list[int], gathered: Tensor) -> list[Tensor]:
    """Our own 4-bit product once for each touched expert, over rows gathered before."""
    size = layer.n * layer.k
    first, out = 0, []
    for e, end in enumerate(ends):
        if end > first:
            codes, scales = packed[e * size // 2 : (e + 1) * size // 2], absmax[e * size // 64 : (e + 1) * size // 64]
            out.append(ops.gemm_4bit(gathered[first:end], codes, [layer.n, layer.k], scales, 64, "nf4"))
        first = end
    return out


def products(deadline: float, out: Path) -> None:
    """One row for each layer and batch."""
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    rows: list[dict[str, Any]] = []
    for name, (count, chosen, n, k) in LAYERS.items():
        stored = weights(count, n, k, 2)
        dense = [
            torch.randn(count, n, k, device="cuda", dtype=torch.bfloat16) * 0.02
            for _ in range(2 if n * k < 1 << 26 else 1)
        ]
        for tokens in TOKENS:
            if time.monotonic() > deadline:
                print("out of time at", name, tokens, flush=True)
                return
            layer = Layer(count, chosen, n, k, tokens)
            ends = layer.ends.tolist()
            gathered = layer.x[layer.order.long() // chosen]

            def one(c: tuple[Tensor, Tensor], layer: Layer = layer) -> Tensor:
                return ops.gemm_4bit_grouped(
                    layer.x, c[0], [layer.count, layer.n, layer.k], layer.order, layer.ends, c[1], 64, "nf4"
                )

            error = check(layer, *stored[0], one(stored[0]))
            times = {
                "grouped": graph_time([lambda c=c: one(c) for c in stored]),
                "with_sort": graph_time([lambda c=c: (ops.group_rows(layer.experts, count), one(c)) for c in stored]),
                "loop": graph_time([lambda c=c: loop(layer, *c, ends, gathered) for c in stored], 5),
                "bf16_grouped_mm": graph_time(
                    [lambda w=w: grouped_mm(gathered, w.transpose(1, 2), offs=layer.ends) for w in dense], 5
                ),
            }
            tile = tile_for(gpu_of(0), tokens * chosen, count, n, k)
            row = {
                "layer": name, "experts": count, "chosen": chosen, "n": n, "k": k, "tokens": tokens,
                "touched": layer.touched, "floor": round(layer.floor(), 2),
                **{key: round(value, 2) for key, value in times.items()}, "error": f"{error:.1e}", "tile": tile,
            }  # fmt: skip
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            write_csv("gpu_moe.csv", rows, out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--tiles", action="store_true")
    parsed = parser.parse_args()
    deadline = time.monotonic() + parsed.seconds
    if parsed.tiles:
        try:
            compile_ahead()
        except Exception as error:
            print("compiling ahead failed", repr(error)[:300], flush=True)
        print("compiled", round(deadline - time.monotonic(), 1), "s left", flush=True)
        tiles(deadline, parsed.out)
    else:
        products(deadline, parsed.out)


if __name__ == "__main__":
    main()
