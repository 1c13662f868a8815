"""Linear8bitLt on a GPU beside nn.Linear and F.linear in fp16, and bitsandbytes' Linear8bitLt.

Run: ``python benchmarks/gpu_int8.py [--out FOLDER] [--seconds N] [--trace | --graphs]`` from a source folder, on a
machine with a GPU, with bitsandbytes importable where it should be compared. Products are checked against fp32 first.
Weights rotate past the level-2 cache. All ways are timed in turn, and each round another one begins. Microseconds:

* ``graph``: of a call in a CUDA graph that holds one call for each copy of the weight. bitsandbytes waits for the GPU
  in every call: no graph holds it.
* ``eager``: from the start of one call until the GPU is done, the GPU idle before.
* ``host``: until a call returns, while the GPU works on those before.

``--trace`` writes, instead, which calls of the CUDA runtime and driver one forward pass makes, and what the GPU does;
``--graphs`` the times in CUDA graphs at more batches and shapes, with and without a threshold.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import copies_for, write_csv
from benchmarks.gpu_4bit import captured
from halfbyte.nn import Linear8bitLt

SHAPES = [(4096, 4096), (14336, 4096)]
BATCHES = [1, 16, 512, 2048]
GRAPH_SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]
GRAPH_BATCHES = [1, 4, 16, 32, 64, 128, 256, 512, 2048]
THRESHOLD = 6.0
ROUNDS = 12
EAGER_CALLS = 8
HOST_CALLS = 30
WARM_SECONDS = (1.5, 0.3)
"""Untimed calls of all ways before the first point, and before the others."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "Memcpy DtoH")
"""What a forward pass that waits for the GPU shows in a trace."""

Calls = list[Callable[[], Any]]


def weight_of(n: int, k: int) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(n + k)
    return (torch.randn(n, k, device="cuda", generator=generator) * 0.02).half()


def activation(batch: int, k: int, outliers: bool = True) -> Tensor:
    """fp32, without and with three columns of outliers."""
    generator = torch.Generator(device="cuda").manual_seed(batch)
    x = torch.randn(batch, k, device="cuda", generator=generator).clamp_(-5, 5)
    if outliers:
        x[:, [3, k // 2, k - 1]] *= 8
    return x


def quantized(kind: Any, weight: Tensor, count: int) -> list[Any]:
    """``count`` 8-bit layers of that weight."""
    first = kind(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=THRESHOLD)
    first.weight.data = weight.cpu().clone()
    first = first.cuda().eval()
    if isinstance(first, Linear8bitLt):
        return [first, *(copy.deepcopy(first) for _ in range(count - 1))]
    return [first]


def layers(weight: Tensor) -> dict[str, list[Any]]:
    """Who -> functions of the activation, one for each copy of the weight."""
    (n, k), count = weight.shape, copies_for(weight.numel())
    dense = [weight.clone() for _ in range(max(2, count // 2))]
    modules: list[Any] = []
    for tensor in dense:
        module = torch.nn.Linear(k, n, bias=False, device="meta")
        module.weight = torch.nn.Parameter(tensor, requires_grad=False)
        modules.append(module)
    found: dict[str, list[Any]] = {
        "F.linear fp16": [lambda x, w=w: F.linear(x, w) for w in dense],
        "nn.Linear fp16": modules,
        "halfbyte": quantized(Linear8bitLt, weight, count),
    }
    peer = _peer()
    return found if peer is None else {**found, "bitsandbytes": quantized(peer, weight, 1)}


def ways(made: dict[str, list[Any]], weight: Tensor, x: Tensor) -> dict[str, Calls]:
    """Who -> calls. halfbyte gets bf16, the others fp16. Refuses products that are off by more than 2 %."""
    given = {who: x.to(torch.bfloat16 if who == "halfbyte" else torch.float16) for who in made}
    found: dict[str, Calls] = {
        who: [lambda one=one, a=given[who]: one(a) for one in functions] for who, functions in made.items()
    }
    expected = x @ weight.float().t()
    for who, calls in found.items():
        for call in calls:
            call()
        error = float((calls[0]().float() - expected).norm() / expected.norm())
        if not error < 0.02:
            raise SystemExit(f"{who} is off by {error:.2%}: not timed")
    return found


def _graph(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e3 / count]


def _eager(calls: Calls, turn: int) -> list[float]:
    taken: list[float] = []
    for number in range(EAGER_CALLS):
        call = calls[(turn * EAGER_CALLS + number) % len(calls)]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - begin) * 1e6)
    return taken


def _host(calls: Calls) -> list[float]:
    torch.cuda.synchronize()
    call = calls[0]
    begin = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    taken = (time.perf_counter() - begin) / HOST_CALLS * 1e6
    torch.cuda.synchronize()
    return [taken]


def measure(found: dict[str, Calls], warm: float) -> list[dict[str, Any]]:
    """Rows of one point, after ``warm`` seconds."""
    graphs = {who: captured(calls) for who, calls in found.items() if who != "bitsandbytes"}
    taken: dict[tuple[str, str], list[float]] = {}
    begin = time.perf_counter()
    while time.perf_counter() - begin < warm:
        for calls in found.values():
            _eager(calls, 0)
    order = list(found)
    for number in range(ROUNDS):
        for who in order[number % len(order) :] + order[: number % len(order)]:
            calls = found[who]
            taken.setdefault((who, "eager"), []).extend(_eager(calls, number))
            taken.setdefault((who, "host"), []).extend(_host(calls))
            if who in graphs:
                taken.setdefault((who, "graph"), []).extend(_graph(graphs[who], len(calls)))
    return [
        {"who": who, "how": how, "us": round(sorted(us)[len(us) // 2], 1), "least": round(min(us), 1)}
        for (who, how), us in taken.items()
    ]


def traced(who: str, call: Callable[[], Any], batch: int, outliers: bool) -> list[dict[str, Any]]:
    """What one call asks of the CUDA runtime and driver, and what runs on the GPU, counted. Refuses one that waits."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        with torch.profiler.record_function("one forward pass"):
            call()
        torch.cuda.synchronize()
    events = list(profile.events() or [])
    (whole,) = (event.time_range for event in events if event.name == "one forward pass" and not _on_gpu(event))
    counted: Counter[tuple[str, str]] = Counter()
    for event in events:
        if _on_gpu(event):
            counted["GPU", event.name.split("<")[0][:60]] += event.name != "one forward pass"
        elif event.name.startswith(("cu", "Memcpy")) and whole.start <= event.time_range.start <= whole.end:
            counted["host", event.name] += 1
    waits = [name for _, name in counted if name.startswith(WAITS)]
    if waits and who == "halfbyte":
        raise SystemExit(f"{who} waits for the GPU: {waits}")
    point = {"who": who, "batch": batch, "outliers": outliers}
    return [{**point, "where": where, "what": what, "count": n} for (where, what), n in sorted(counted.items()) if n]


def _on_gpu(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CUDA


def traces() -> Iterator[list[dict[str, Any]]]:
    """Rows of every batch with and without outliers at the first shape."""
    n, k = SHAPES[0]
    weight = weight_of(n, k)
    for who, kind in (("halfbyte", Linear8bitLt), ("bitsandbytes", _peer())):
        if kind is None:
            continue
        (layer,) = quantized(kind, weight, 1)
        for batch in BATCHES if who == "halfbyte" else BATCHES[::3]:
            for outliers in (False, True):
                x = activation(batch, k, outliers)
                x = x.bfloat16() if who == "halfbyte" else x.half()
                yield traced(who, lambda layer=layer, x=x: layer(x), batch, outliers)


def graphs() -> Iterator[dict[str, Any]]:
    """Times in CUDA graphs: fp16, and halfbyte with and without a threshold; medians of 7 in turn."""
    for n, k in GRAPH_SHAPES:
        weight = weight_of(n, k)
        count = copies_for(weight.numel())
        dense, eight = [weight.clone() for _ in range(max(2, count // 2))], quantized(Linear8bitLt, weight, count)
        for batch in GRAPH_BATCHES:
            x = activation(batch, k)
            half, given = x.half(), x.bfloat16()
            calls = {"fp16": [lambda w=w, a=half: F.linear(a, w) for w in dense]}
            made = {"fp16": captured(calls["fp16"])}
            calls["halfbyte"] = [lambda layer=layer, a=given: layer(a) for layer in eight]
            for name, threshold in (("without threshold", 0.0), ("halfbyte", THRESHOLD)):
                for layer in eight:
                    layer.state.threshold = threshold
                made[name] = captured(calls["halfbyte"])
            taken: dict[str, list[float]] = {name: [] for name in made}
            for _ in range(7):
                for name, graph in made.items():
                    taken[name] += _graph(graph, len(calls.get(name, calls["halfbyte"])))
            yield {"n": n, "k": k, "batch": batch, **{name: round(sorted(us)[3], 1) for name, us in taken.items()}}


def _peer() -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    with contextlib.suppress(ImportError, OSError):
        import bitsandbytes

        return bitsandbytes.nn.Linear8bitLt
    return None


def main() -> None:
    """Measure, write ``gpu_int8.csv``, ``gpu_int8_trace.csv`` or ``gpu_int8_graphs.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=float, default=600.0, help="no further point once this has passed")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--graphs", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    begin, rows = time.perf_counter(), list[dict[str, Any]]()
    gpu = {"gpu": torch.cuda.get_device_name()}
    with torch.no_grad():
        if args.trace:
            for found in traces():
                rows += found
                print(*(" ".join(map(str, row.values())) for row in found), sep="\n", flush=True)
                path = write_csv("gpu_int8_trace.csv", [{**row, **gpu} for row in rows], args.out)
            print(path)
            return
        if args.graphs:
            for row in graphs():
                rows.append(row)
                print(*row.items(), flush=True)
                path = write_csv("gpu_int8_graphs.csv", [{**row, **gpu} for row in rows], args.out)
            print(path)
            return
        for n, k in SHAPES:
            weight = weight_of(n, k)
            made = layers(weight)
            for batch in BATCHES:
                if time.perf_counter() - begin > args.seconds:
                    break
                found = measure(ways(made, weight, activation(batch, k)), WARM_SECONDS[bool(rows)])
                rows += [{"n": n, "k": k, "batch": batch, **row} for row in found]
                said = (f"{row['who']} {row['how']} {row['us']} ({row['least']})" for row in found)
                print(n, k, batch, *said, sep="  ", flush=True)
                path = write_csv("gpu_int8.csv", [{**row, **gpu} for row in rows], args.out)
    print(path)


if __name__ == "__main__":
    main()
