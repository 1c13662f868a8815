"""Optimizer steps on a CPU: ours in 8 and 32 bits, torch's fused AdamW and, where it is installed, bitsandbytes'.

    OMP_NUM_THREADS=2 python benchmarks/cpu_optim.py [--seconds 40] [--out FOLDER] [--tag TEXT]

All cases take turns. ``wall`` is the time that passed; ``busy`` the time that the calling thread computed, which a
loaded machine disturbs less (run with one thread to compare by it). Writes ``benchmarks/results/cpu_optim.csv``
(``cpu_optim_TAG.csv``).
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
from benchmarks.common import RESULTS, interleave, write_csv
from halfbyte import optim
from halfbyte.backends.cpu import host

NUMEL = 1 << 22


def step_of(make: Callable[[list[torch.nn.Parameter]], Any], dtype: torch.dtype) -> Callable[[int], object]:
    """A step on fresh parameters with fixed gradients."""
    parameter = torch.nn.Parameter(torch.randn(NUMEL).to(dtype))
    parameter.grad = torch.randn(NUMEL).mul(1e-2).to(dtype)
    optimizer = make([parameter])
    return lambda _number: optimizer.step()


def cases() -> dict[str, Callable[[int], object]]:
    """Name -> step."""
    fp32, bf16 = torch.float32, torch.bfloat16
    found = {
        "torch AdamW fused, fp32": step_of(lambda p: torch.optim.AdamW(p, fused=True), fp32),
        "AdamW8bit, fp32": step_of(optim.AdamW8bit, fp32),
        "AdamW32bit, fp32": step_of(optim.AdamW32bit, fp32),
        "AdamW8bit, bf16": step_of(optim.AdamW8bit, bf16),
        "Lion8bit, fp32": step_of(optim.Lion8bit, fp32),
        "AdEMAMix8bit, fp32": step_of(optim.AdEMAMix8bit, fp32),
    }
    if importlib.util.find_spec("bitsandbytes"):
        theirs = importlib.import_module("bitsandbytes.optim")
        found["bitsandbytes AdamW8bit, fp32"] = step_of(theirs.AdamW8bit, fp32)
        found["bitsandbytes Lion8bit, fp32"] = step_of(theirs.Lion8bit, fp32)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tag", default="")
    given = parser.parse_args()
    rows: list[dict[str, object]] = []
    chosen = cases()
    wall = interleave(chosen, repeats=40, seconds=given.seconds)
    busy = interleave(chosen, repeats=8, seconds=given.seconds / 2, clock=time.thread_time)
    base = {"wall": wall["torch AdamW fused, fp32"], "busy": busy["torch AdamW fused, fp32"]}
    for name in chosen:
        row = {"case": name, "level": host.level().name, "parameters": NUMEL, "threads": torch.get_num_threads()}
        for kind, timing in (("wall", wall[name]), ("busy", busy[name])):
            row |= {
                f"{kind}_median_ms": f"{timing.median * 1e3:.2f}",
                f"{kind}_least_ms": f"{timing.least * 1e3:.2f}",
                f"{kind}_against_torch": f"{timing.median / base[kind].median:.2f}",
                f"{kind}_least_against_torch": f"{timing.least / base[kind].least:.2f}",
            }
        rows.append(row)
        print(name, {key: value for key, value in row.items() if "_ms" in key or "against" in key})
    write_csv(f"cpu_optim{given.tag and '_' + given.tag}.csv", rows, given.out)


if __name__ == "__main__":
    main()
