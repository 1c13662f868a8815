"""Linear8bitLt on a GPU: halfbyte in a CUDA graph and eager, bitsandbytes eager, F.linear in bf16 and fp16.

Run: ``python benchmarks/gpu_int8.py [--out FOLDER] [--seconds N]`` from a source folder, on a machine with a GPU, with
bitsandbytes importable where it should be compared. Every product is checked against fp32 before it is timed. Weights
rotate past the level-2 cache; microseconds, medians. bitsandbytes waits for the GPU in every call: no graph holds it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import copies_for, write_csv
from benchmarks.gpu_4bit import eager_time, graph_time
from halfbyte.nn import Linear8bitLt

SHAPES = [(4096, 4096), (14336, 4096)]
BATCHES = [1, 2048, 16, 512]
THRESHOLD = 6.0
Call = Callable[[], Any]


def eager(calls: list[Call], repeats: int = 40) -> float:
    """Median microseconds of one call, from its start until the GPU is done."""
    taken: list[float] = []
    for number in range(repeats + 10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        calls[number % len(calls)]()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - begin) * 1e6)
    return sorted(taken[10:])[repeats // 2]


def layers(kind: Any, weight: Tensor, count: int) -> list[Any]:
    """``count`` quantized layers of that weight."""
    made: list[Any] = []
    for _ in range(count):
        layer = kind(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=THRESHOLD)
        if made and isinstance(layer, Linear8bitLt):
            layer = copy.deepcopy(made[0])
        else:
            layer.weight.data = weight.cpu().clone()
        made.append(layer.cuda().eval())
    return made


def kernels_of(call: Call) -> int:
    """How many kernels one call starts. Refuses a call that waits for the GPU."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        call()
    names = [event.key for event in profile.key_averages() for _ in range(event.count)]
    waits = [name for name in names if "Synchronize" in name and "cudaDeviceSynchronize" not in name]
    if waits or "aten::item" in names or "aten::nonzero" in names:
        raise SystemExit(f"the call waits for the GPU: {waits}")
    return sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaMemset")) for name in names)


def checked(found: Tensor, x: Tensor, weight: Tensor, who: str) -> None:
    """Refuse to time a product that is off by more than 2 %."""
    expected = x.float() @ weight.float().t()
    error = float((found.float() - expected).norm() / expected.norm())
    if not error < 0.02:
        raise SystemExit(f"{who} is off by {error:.2%}: not timed")


def measure(n: int, k: int, batch: int) -> list[dict[str, Any]]:
    weight = torch.randn(n, k, device="cuda", dtype=torch.float16) * 0.02
    x = torch.randn(batch, k, device="cuda")
    x[:, [3, k // 2, k - 1]] *= 8
    count = copies_for(n * k)
    rows: list[dict[str, Any]] = []

    def add(who: str, how: str, value: float) -> None:
        rows.append({"n": n, "k": k, "batch": batch, "who": who, "how": how, "us": round(value, 1)})

    for dtype in (torch.bfloat16, torch.float16):
        copies = [weight.to(dtype, copy=True) for _ in range(max(2, count // 2))]
        given = x.to(dtype)
        dense = [lambda w=w, a=given: F.linear(a, w) for w in copies]
        name = "F.linear bf16" if dtype == torch.bfloat16 else "F.linear fp16"
        add(name, "graph", graph_time(dense))
        add(name, "eager", eager(dense))
        if dtype == torch.float16:
            add(name, "host", eager_time(dense[0]))
            module = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=dtype)
            add("nn.Linear fp16", "eager", eager([lambda layer=module, a=given: layer(a)]))
            add("nn.Linear fp16", "host", eager_time(lambda layer=module, a=given: layer(a)))
    half = x.half()
    for who, kind in (("halfbyte", Linear8bitLt), ("bitsandbytes", _peer())):
        if kind is None:
            continue
        given = x.bfloat16() if who == "halfbyte" else half
        copies = layers(kind, weight, count if who == "halfbyte" else 2)
        calls = [lambda layer=layer, a=given: layer(a) for layer in copies]
        checked(calls[0](), x, weight, who)
        add(who, "eager", eager(calls))
        if who == "halfbyte":
            add(who, "graph", graph_time(calls))
            add(who, "host", eager_time(calls[0]))
            add(who, "kernels", float(kernels_of(calls[0])))
    return rows


def _peer() -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    with contextlib.suppress(ImportError, OSError):
        import bitsandbytes

        return bitsandbytes.nn.Linear8bitLt
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=float, default=600.0, help="no further case once this has passed")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    begin, rows = time.perf_counter(), []
    with torch.no_grad():
        for batch in BATCHES:
            for n, k in SHAPES:
                if time.perf_counter() - begin > args.seconds:
                    break
                found = measure(n, k, batch)
                rows += found
                print(n, k, batch, *(f"{row['who']} {row['how']} {row['us']}" for row in found), sep="  ", flush=True)
    gpu = torch.cuda.get_device_name().replace(" ", "-")
    print(write_csv(f"gpu_int8_{gpu}.csv", [{**row, "gpu": gpu} for row in rows], args.out))


if __name__ == "__main__":
    main()
