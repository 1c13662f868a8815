"""Host time of one eager call of a layer on a GPU: nn.Linear, halfbyte's Linear4bit, bitsandbytes' Linear4bit.

Run: ``python benchmarks/gpu_host.py [--out FOLDER] [--rounds 40]``. All layers are timed in turn, 50 calls each, so
that a disturbance of the machine falls on all of them; the GPU is idle at the start of each turn and never waited for
within. "trained" is the product with the gradient to the activation.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_csv
from benchmarks.gpu_model import turn

CALLS = 50
SIZE = 4096


def layers() -> dict[str, tuple[Any, int]]:
    """Name -> layer and rows of its activation."""
    from halfbyte.nn import Linear4bit

    found: dict[str, tuple[Any, int]] = {}
    plain = torch.nn.Linear(SIZE, SIZE, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    kinds = {"halfbyte": Linear4bit}
    if importlib.util.find_spec("bitsandbytes") is not None:
        from bitsandbytes.nn import Linear4bit as theirs

        kinds["bitsandbytes"] = theirs
    for rows in (1, 8, 32, 2048):
        found[f"nn.Linear, {rows} rows"] = (plain, rows)
        for name, kind in kinds.items():
            for nested in (False, True) if rows < 2048 else (True,):
                layer = kind(SIZE, SIZE, False, torch.bfloat16, nested, quant_type="nf4").cuda()
                found[f"{name} {'nested' if nested else 'plain'}, {rows} rows"] = (layer, rows)
    return found


@torch.enable_grad()
def both_ways(layer: torch.nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> None:
    """The product, and the gradient to the activation."""
    torch.autograd.grad(layer(x), x, upstream)


def microseconds(call: Callable[[], Any]) -> float:
    """Microseconds of host time of one call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    """Measure, write ``gpu_host.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--lock", type=Path, help="held while measuring: benchmarks with the same file take turns")
    arguments = parser.parse_args()
    with turn(arguments.lock), torch.no_grad():
        calls: dict[str, Callable[[], Any]] = {}
        for name, (layer, rows) in layers().items():
            x = torch.randn(rows, 1, SIZE, device="cuda", dtype=torch.bfloat16)
            calls[name] = lambda layer=layer, x=x: layer(x)
            if rows == 2048:
                trained = x.clone().requires_grad_()
                calls[f"{name}, trained"] = lambda layer=layer, x=trained, upstream=x: both_ways(layer, x, upstream)
        for call in list(calls.values()) * 3:
            call()
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for done in range(1, arguments.rounds + 1):
            for name, call in calls.items():
                taken[name].append(microseconds(call))
            if done % 10 == 0 or done == arguments.rounds:
                write_csv("gpu_host.csv", table(taken), arguments.out)
    for row in table(taken):
        print(row["layer"], row["microseconds"], "least", row["least"], flush=True)


def table(taken: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Rows of the CSV."""
    return [
        {
            "layer": name,
            "microseconds": round(sorted(times)[len(times) // 2], 2),
            "least": round(min(times), 2),
            "device": torch.cuda.get_device_name(),
        }
        for name, times in taken.items()
    ]


if __name__ == "__main__":
    main()
