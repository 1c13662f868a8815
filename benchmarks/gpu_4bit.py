"""4-bit products and quantization on a GPU: halfbyte, bitsandbytes, torch's own int4, F.linear, the floor.

Run: ``python benchmarks/gpu_4bit.py [--out FOLDER] [--seconds N]`` from a source folder, on a machine with a GPU, with
bitsandbytes importable where it should be compared. Every product is checked against float64 before it is timed.
Times are CUDA-graph replays over weights that rotate past the level-2 cache, medians, in microseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import copies_for, facts, write_csv
from halfbyte.backends import registry
from halfbyte.backends.reference import blockwise as reference_8bit
from halfbyte.formats.dynamic import dynamic_map

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (5000, 3072), (8192, 28672)]
BATCHES = [1, 2, 4, 8, 16, 17, 32, 33, 64, 65, 128, 256, 512, 2048]
NESTED_BATCHES = (1, 8, 64)
BACKWARD_BATCHES = (128, 512, 2048)
BANDWIDTH = 3.0e6
"""Bytes per microsecond that a large read reaches on an H100: the floor is the packed bytes and fp32 scales at that."""

ops = torch.ops.halfbyte


def captured(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def graph_time(calls: list[Callable[[], Any]], repeats: int = 7) -> float:
    """Median microseconds of one of ``calls``, all captured into one graph."""
    graph = captured(calls)
    graph.replay()
    torch.cuda.synchronize()
    taken: list[float] = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return sorted(taken)[len(taken) // 2]


def eager_time(call: Callable[[], Any], repeats: int = 200) -> float:
    """Microseconds of host time of one call."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    taken = (time.perf_counter() - start) / repeats * 1e6
    torch.cuda.synchronize()
    return taken


def nest(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """absmax double-quantized: second level, codes, map, offset."""
    code, offset = torch.from_numpy(dynamic_map()).cuda(), absmax.mean()
    codes, second = reference_8bit.quantize_blockwise(absmax - offset, code, 256)
    return second, codes, code, offset


def error_of(result: Tensor, exact: Tensor) -> float:
    """Relative error of a product against float64.

    Raises:
        SystemExit: Larger than a 16-bit product may have.
    """
    error = ((result.double() - exact).norm() / exact.norm()).item()
    if not error < 5e-3:
        raise SystemExit(f"wrong result, nothing is timed: relative error {error} for {tuple(result.shape)}")
    return error


@dataclass(frozen=True)
class Exact:
    """A dequantized weight before its rounding to 16 bits, in float64, and after it."""

    weight: Tensor
    rounded: Tensor

    @classmethod
    def of(cls, n: int, k: int, packed: Tensor, absmax: Tensor, *nested: Tensor) -> Exact:
        """Of packed codes."""
        weight = ops.dequantize_4bit(packed, absmax, 64, "nf4", [n, k], torch.float32, *nested)
        return cls(weight.double(), weight.to(torch.bfloat16))

    def forward(self, x: Tensor, result: Tensor) -> float:
        """Error of ``result = x @ weight.T``."""
        return error_of(result, x.double() @ self.weight.T)

    def backward(self, grad: Tensor, result: Tensor) -> float:
        """Error of ``result = grad @ weight``."""
        return error_of(result, grad.double() @ self.weight)


def compile_ahead(worker: int, workers: int) -> None:
    """Compile this worker's share of the kernels into Triton's cache."""
    jobs = [(n, k, m, nested) for n, k in SHAPES for m in BATCHES for nested in (False, True)]
    jobs = [job for job in jobs if not job[3] or job[2] in NESTED_BATCHES]
    second = None
    for n, k, m, nested in jobs[worker::workers]:
        packed = torch.zeros(n * k // 2, 1, dtype=torch.uint8, device="cuda")
        absmax = torch.zeros(n * k // 64, device="cuda")
        x = torch.zeros(m, k, dtype=torch.bfloat16, device="cuda")
        rest: tuple[Any, ...] = (None, None, None)
        if nested:
            second = absmax.to(torch.uint8)
            rest = (second, torch.zeros(256, device="cuda"), torch.zeros((), device="cuda"))
            absmax = absmax[: -(-absmax.numel() // 256)]
        ops.gemm_4bit(x, packed, [n, k], absmax, 64, "nf4", None, *rest)
        if m in BACKWARD_BATCHES:
            ops.gemm_4bit_dgrad(x.new_zeros(m, n), packed, [n, k], absmax, 64, "nf4", *rest)


def products(n: int, k: int, deadline: float) -> list[dict[str, Any]]:
    """Rows of one shape."""
    copies = copies_for(n * k // 2)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(2)]
    packed = [ops.quantize_4bit(weights[i % 2], 64, "nf4", torch.uint8) for i in range(copies)]
    nested = [(codes, *nest(absmax)) for codes, absmax in packed]
    exact = Exact.of(n, k, *packed[0])
    peer = _peer(packed, n, k)
    rows: list[dict[str, Any]] = []
    for m in BATCHES:
        if time.monotonic() > deadline:
            print("out of time at", n, k, m, flush=True)
            break
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        floor = round((n * k / 2 + n * k / 16) / BANDWIDTH, 2)
        row = {"n": n, "k": k, "m": m, "floor": floor, **_point(n, k, x, packed, nested, weights, peer, exact)}
        row["torch_int4"] = _int4(n, k, x, copies) if m <= 64 else ""
        row |= dict.fromkeys(("backward", "backward_bf16", "backward_error", "backward_error_bf16"), "")
        if m in BACKWARD_BATCHES:
            row |= _backward(n, k, m, packed, weights, exact)
        rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)
    return rows


def _point(
    n: int, k: int, x: Tensor, packed: list[Any], nested: list[Any], weights: list[Tensor], peer: Any, exact: Exact
) -> dict[str, Any]:
    """Errors, ours and that of F.linear with the dequantized weight in bf16, and times of one batch."""
    if x.shape[0] not in NESTED_BATCHES:
        nested = []
    for codes, second, *rest in nested[:1]:
        # Nested scales are other scales, and make another weight.
        Exact.of(n, k, codes, second, *rest).forward(x, ops.gemm_4bit(x, codes, [n, k], second, 64, "nf4", None, *rest))
    row: dict[str, Any] = {
        "error": exact.forward(x, ops.gemm_4bit(x, packed[0][0], [n, k], packed[0][1], 64, "nf4")),
        "error_bf16": exact.forward(x, F.linear(x, exact.rounded)),
    }
    calls: dict[str, list[Callable[[], Any]]] = {
        "ours": [lambda p=p, a=a: ops.gemm_4bit(x, p, [n, k], a, 64, "nf4") for p, a in packed],
        "ours_nested": [
            lambda p=p, a=a, r=r: ops.gemm_4bit(x, p, [n, k], a, 64, "nf4", None, *r) for p, a, *r in nested
        ],
        "bf16": [lambda w=w: F.linear(x, w) for w in weights],
        "bnb": [lambda c=c: c(x) for c in peer or ()],
    }
    for name, functions in calls.items():
        row[name] = round(graph_time(functions), 2) if functions else ""
    return row


def _backward(n: int, k: int, m: int, packed: list[Any], weights: list[Tensor], exact: Exact) -> dict[str, Any]:
    grad = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    ours = graph_time([lambda p=p, a=a: ops.gemm_4bit_dgrad(grad, p, [n, k], a, 64, "nf4") for p, a in packed])
    return {
        "backward": round(ours, 2),
        "backward_bf16": round(graph_time([lambda w=w: grad @ w for w in weights]), 2),
        "backward_error": exact.backward(
            grad, ops.gemm_4bit_dgrad(grad, packed[0][0], [n, k], packed[0][1], 64, "nf4")
        ),
        "backward_error_bf16": exact.backward(grad, grad @ exact.rounded),
    }


def _peer(packed: list[tuple[Tensor, Tensor]], n: int, k: int) -> list[Callable[[Tensor], Tensor]] | None:
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, get_4bit_type

    code = get_4bit_type("nf4", device="cuda")

    def call(codes: Tensor, absmax: Tensor) -> Callable[[Tensor], Tensor]:
        state = QuantState(
            absmax=absmax, shape=torch.Size((n, k)), code=code, blocksize=64, quant_type="nf4", dtype=torch.bfloat16
        )
        return lambda x: bnb.matmul_4bit(x, codes.t(), quant_state=state)

    return [call(codes, absmax) for codes, absmax in packed]


def _int4(n: int, k: int, x: Tensor, copies: int) -> float | str:
    if n % 64 or k % 1024:
        return ""
    values = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    weights = [torch._convert_weight_to_int4pack(values, 8) for _ in range(copies)]
    scales = torch.rand(k // 64, n, 2, dtype=torch.bfloat16, device="cuda")
    return round(graph_time([lambda w=w: torch._weight_int4pack_mm(x, w, 64, scales) for w in weights], 3), 2)


def memory_jobs() -> list[dict[str, Any]]:
    """Quantize and dequantize against a copy, as shares of its bandwidth."""
    count = 1 << 28
    x = torch.randn(count, device="cuda", dtype=torch.bfloat16) * 0.02
    y = torch.empty_like(x)
    copy = 4 * count / graph_time([lambda: y.copy_(x)] * 2)
    rows: list[dict[str, Any]] = [{"job": "copy", "microseconds": "", "bytes_per_us": round(copy), "of_copy": 1.0}]

    def measure(job: str, call: Callable[[], Any], nbytes: float) -> None:
        taken = graph_time([call] * 2)
        rate = nbytes / taken
        row = {"job": job, "microseconds": round(taken, 1), "bytes_per_us": round(rate)}
        rows.append({**row, "of_copy": round(rate / copy, 3)})
        print(rows[-1], flush=True)

    for kind in ("nf4", "fp4"):
        measure(f"quantize {kind}", lambda k=kind: ops.quantize_4bit(x, 64, k, torch.uint8), count * 2.5625)
    packed, absmax = ops.quantize_4bit(x, 64, "nf4", torch.uint8)
    into = ops.dequantize_4bit.out
    measure(
        "dequantize nf4",
        lambda: into(packed, absmax, 64, "nf4", [count], torch.bfloat16, out=y),
        count * 2.5625,
    )
    second, codes, code, offset = nest(absmax)
    measure(
        "dequantize nf4 nested",
        lambda: into(packed, second, 64, "nf4", [count], torch.bfloat16, codes, code, offset, out=y),
        count * (2.5 + 1 / 64),
    )
    eight_bit = ops.dequantize_blockwise.out
    for size in (256, 4096):
        measure(f"quantize 8-bit {size}", lambda s=size: ops.quantize_blockwise(x, code, s), count * 3)
        eight, scales = ops.quantize_blockwise(x, code, size)
        measure(
            f"dequantize 8-bit {size}",
            lambda s=size, e=eight, a=scales: eight_bit(e, a, code, s, torch.bfloat16, out=y),
            count * 3,
        )
    return rows


def host_jobs() -> list[dict[str, Any]]:
    """Host time of one eager call of a layer, batch 1, 4096x4096."""
    from halfbyte.nn import Linear4bit

    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    plain = torch.nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16)
    layers: dict[str, Any] = {"nn.Linear": plain}
    layers["halfbyte.nn.Linear4bit"] = Linear4bit(
        4096, 4096, False, torch.bfloat16, compress_statistics=False, quant_type="nf4"
    ).cuda()
    if importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes as bnb

        layers["bitsandbytes.nn.Linear4bit"] = bnb.nn.Linear4bit(
            4096, 4096, False, torch.bfloat16, compress_statistics=False, quant_type="nf4"
        ).cuda()
    with torch.no_grad():
        return [
            {"job": f"host time of {name}", "microseconds": round(eager_time(lambda a=layer: a(x)), 1)}
            for name, layer in layers.items()
        ]


def main() -> None:
    """Measure all, write ``gpu_4bit.csv`` and ``gpu_memory.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop starting new points after this many")
    parser.add_argument("--compile-only", type=int, default=0, metavar="WORKERS", help="fill Triton's cache and stop")
    parser.add_argument("--no-compile", action="store_true", help="Triton's cache is full already")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    workers = arguments.compile_only or max(1, min(14, multiprocessing.cpu_count() - 1))
    context = multiprocessing.get_context("spawn")
    with contextlib.nullcontext() if arguments.no_compile else context.Pool(workers) as pool:
        if pool is not None:
            pool.starmap(compile_ahead, [(i, workers) for i in range(workers)])
    if arguments.compile_only:
        return
    torch.manual_seed(0)
    device = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    print(device, {name: facts()[name] for name in ("torch", "triton", "bitsandbytes", "commit")}, flush=True)
    print(registry.explain("gemm_4bit", torch.zeros(1, device="cuda")), flush=True)
    others = host_jobs() + memory_jobs()
    columns = ("job", "microseconds", "bytes_per_us", "of_copy")
    write_csv("gpu_memory.csv", ({**{c: row.get(c, "") for c in columns}, **device} for row in others), arguments.out)
    for row in others[:3]:
        print(row, flush=True)
    rows: list[dict[str, Any]] = []
    for n, k in SHAPES:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            rows += products(n, k, deadline)
        torch.cuda.empty_cache()
        if rows:
            write_csv("gpu_4bit.csv", ({**row, **device} for row in rows), arguments.out)


if __name__ == "__main__":
    main()
