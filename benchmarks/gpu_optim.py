"""Optimizer steps on a GPU: ours, torch's fused AdamW and, where it is installed, bitsandbytes', against a copy.

    python benchmarks/gpu_optim.py [--out FOLDER]

Writes ``gpu_optim.csv``: milliseconds of a step, bytes that it must move, and their rate over that of a copy.
``ms``: steps one behind the other, a tenth of a second of them. ``alone_ms``: a step that begins on an idle GPU,
so that the host's time counts in full. ``host_ms``: until ``step()`` returns. ``memory_mib``: device memory that the
optimizer takes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, write_csv
from halfbyte import optim

LARGE, SMALL, COUNT = 1 << 28, 1 << 20, 300
STATES = {"AdamW8bit": 2.03, "AdamW32bit": 8.0, "Lion8bit": 1.02, "AdEMAMix8bit": 3.05, "PagedAdamW8bit": 2.03}
"""Optimizer -> bytes of states for a parameter."""

FEW = ["AdamW8bit", "Lion8bit", "PagedAdamW8bit"]
"""Optimizers of many parameters."""


def median(values: list[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


def timed(step: Callable[[], object], count: int) -> float:
    """Milliseconds on the GPU of ``count`` calls, for one."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


def times(step: Callable[[], object]) -> tuple[float, float, float]:
    """Milliseconds of a step among others, of one alone, and of the host in it."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    alone = median([timed(step, 1) for _ in range(7)])
    host: list[float] = []
    for _ in range(7):
        start = time.perf_counter()
        step()
        host.append((time.perf_counter() - start) * 1e3)
        torch.cuda.synchronize()
    count = max(3, min(50, int(100 / alone)))
    return median([timed(step, count) for _ in range(3)]), alone, median(host)


def parameters(count: int, numel: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Random values with random gradients."""
    made = [torch.nn.Parameter(torch.randn(numel, device="cuda", dtype=dtype)) for _ in range(count)]
    for p in made:
        p.grad = torch.randn_like(p).mul_(1e-2)
    return made


def copy_rate() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.randn(LARGE, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.numel() * 2 / (times(lambda: target.copy_(source))[0] * 1e-3)


def measure(make: Callable[[Any], Any], count: int, numel: int, dtype: torch.dtype) -> dict[str, str]:
    """Columns of a case."""
    made = parameters(count, numel, dtype)
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    optimizer = make(made)
    among, alone, host = times(optimizer.step)
    taken = (before - torch.cuda.mem_get_info()[0]) / 2**20
    del optimizer, made
    torch.cuda.empty_cache()
    return {
        "ms": f"{among:.3f}",
        "alone_ms": f"{alone:.3f}",
        "host_ms": f"{host:.3f}",
        "memory_mib": f"{taken:.0f}",
    }


def graphed(count: int, numel: int) -> dict[str, str]:
    """The same for a step of ours that is replayed from a CUDA graph."""
    made = parameters(count, numel, torch.bfloat16)
    optimizer = optim.AdamW8bit(made, capturable=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    among, alone, host = times(graph.replay)
    return {"ms": f"{among:.3f}", "alone_ms": f"{alone:.3f}", "host_ms": f"{host:.3f}", "memory_mib": ""}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out: Path = parser.parse_args().out
    rate, rows = copy_rate(), []
    print(f"copy {rate / 1e12:.2f} TB/s", flush=True)
    sources: list[tuple[str, Any]] = [("halfbyte", optim)]
    if importlib.util.find_spec("bitsandbytes"):
        sources.append(("bitsandbytes", importlib.import_module("bitsandbytes.optim")))
    fused = lambda p: torch.optim.AdamW(p, fused=True)  # noqa: E731
    bf16, fp32 = torch.bfloat16, torch.float32

    def add(who: str, name: str, dtype: torch.dtype, moved: float, columns: dict[str, str], *size: int) -> None:
        count, numel = size
        share = moved * count * numel / (float(columns["ms"]) * 1e-3) / rate
        row = {"who": who, "optimizer": name, "tensors": count, "numel": numel, "dtype": str(dtype)[6:], **columns}
        copied = f"{rate / 1e12:.3f}"
        rows.append({**row, "of_copy": f"{share:.2f}", "copy_tb_s": copied, "device": torch.cuda.get_device_name()})
        print({key: value for key, value in rows[-1].items() if key != "device"}, flush=True)
        write_csv("gpu_optim.csv", rows, out)

    alike = COUNT * SMALL
    for size, names in ((1, LARGE), list(STATES)), ((COUNT, SMALL), FEW), ((1, alike), FEW[:1]):
        add("torch", "AdamW fused", fp32, 28.0, measure(fused, *size, fp32), *size)
        for name in names:
            for who, source in sources:
                if who != "halfbyte" and name.startswith("Paged"):
                    continue  # theirs lie in managed memory, which can hang a shared GPU
                moved = 6 + 2 * STATES[name]
                add(who, name, bf16, moved, measure(getattr(source, name), *size, bf16), *size)
        add("halfbyte", "AdamW8bit, CUDA graph", bf16, 10.06, graphed(*size), *size)
    add("halfbyte", "AdamW8bit", fp32, 16.06, measure(optim.AdamW8bit, 1, LARGE, fp32), 1, LARGE)


if __name__ == "__main__":
    main()
