"""Optimizer steps on a GPU: ours, torch's fused AdamW and, where it is installed, bitsandbytes', against a copy.

    python benchmarks/gpu_optim.py [--out FOLDER]

Writes ``gpu_optim.csv``: milliseconds of a step, bytes that it must move, and their rate over that of a copy.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, write_csv
from halfbyte import optim

LARGE, SMALL, COUNT = 1 << 28, 1 << 20, 300
STATE_BYTES = {"AdamW8bit": 2.03, "AdamW32bit": 8.0, "Lion8bit": 1.02}


def median_ms(step: Callable[[], object], repeats: int = 15) -> float:
    """Median of single steps between two events."""
    step()
    step()
    taken: list[float] = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return sorted(taken)[len(taken) // 2]


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
    return 2 * source.numel() * 2 / (median_ms(lambda: target.copy_(source)) * 1e-3)


def measure(make: Callable[[Any], Any], count: int, numel: int, dtype: torch.dtype) -> float:
    """Milliseconds of a step."""
    optimizer = make(parameters(count, numel, dtype))
    found = median_ms(optimizer.step)
    del optimizer
    torch.cuda.empty_cache()
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out: Path = parser.parse_args().out
    rate, rows = copy_rate(), []
    sources: list[tuple[str, Any]] = [("halfbyte", optim)]
    if importlib.util.find_spec("bitsandbytes"):
        sources.append(("bitsandbytes", importlib.import_module("bitsandbytes.optim")))
    fused = lambda p: torch.optim.AdamW(p, fused=True)  # noqa: E731
    cases = [
        ("torch", "AdamW fused", fused, torch.float32, 28.0),
        *(
            (who, name, getattr(source, name), torch.bfloat16, 6 + 2 * states)
            for who, source in sources
            for name, states in STATE_BYTES.items()
        ),
    ]
    for count, numel in ((1, LARGE), (COUNT, SMALL), (1, COUNT * SMALL)):
        for who, name, make, dtype, moved in cases:
            ms = measure(make, count, numel, dtype)
            share = moved * count * numel / (ms * 1e-3) / rate
            row = {"who": who, "optimizer": name, "tensors": count, "numel": numel, "dtype": str(dtype)[6:]}
            rows.append({**row, "ms": f"{ms:.3f}", "of_copy": f"{share:.2f}", "device": torch.cuda.get_device_name()})
            print(rows[-1], flush=True)
            write_csv("gpu_optim.csv", rows, out)


if __name__ == "__main__":
    main()
