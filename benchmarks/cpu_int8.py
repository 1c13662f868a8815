"""Linear8bitLt on the CPU: halfbyte, bitsandbytes and torch's dense layer, interleaved in one process.

Usage: python benchmarks/cpu_int8.py [--threads 2] [--out NAME.csv] [--shapes 4096x4096,...] [--batches 1,4,...]
bitsandbytes takes part where it can be imported. Weights rotate over 200 MB; 3 activation columns hold outliers.
On a machine that others use too, ``--threads 1 --cpu-time`` counts only the time that the process had the core.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

import common
from halfbyte.backends.cpu import host
from halfbyte.nn import Linear8bitLt

SHAPES = "4096x4096,11008x4096,576x1536"
BATCHES = "1,4,16,64,256"
THRESHOLD = 6.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
Case = Callable[[int], object]


def rotated(layer: torch.nn.Module, x: torch.Tensor, nbytes: int) -> Case:
    """Calls of as many copies of ``layer`` as fall out of the caches."""
    copies = [layer, *(copy.deepcopy(layer) for _ in range(common.copies_for(nbytes) - 1))]
    return lambda i: copies[i % len(copies)](x)


def eight_bit(kind: Any, dense: torch.nn.Linear, x: torch.Tensor) -> Case:
    """``kind`` is one of the two Linear8bitLt."""
    layer = kind(dense.in_features, dense.out_features, has_fp16_weights=False, threshold=THRESHOLD)
    layer.load_state_dict(dense.state_dict())
    layer = layer.to("cpu").eval()
    layer(x)
    return rotated(layer, x, dense.weight.numel())


def check(cases: dict[str, Case], dense: torch.nn.Linear, x: torch.Tensor) -> None:
    """Refuse to time what is wrong: every case within 2 % of the dense layer in fp32."""
    expected = dense(x.float())
    for who, case in cases.items():
        found = case(0)
        assert isinstance(found, torch.Tensor)
        error = float((found.float() - expected).norm() / expected.norm())
        if error > 0.02:
            raise SystemExit(f"{who} is off by {error:.2%}: not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--batches", default=BATCHES)
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--seconds", type=float, default=8.0, help="at most, for one shape, dtype and batch")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cpu-time", action="store_true", help="time of the calling thread instead of the wall's")
    parser.add_argument("--out", default="cpu_int8.csv")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time counts one thread: add --threads 1")
    clock = time.thread_time if args.cpu_time else time.perf_counter
    logging.disable(logging.WARNING)  # bitsandbytes warns at each call of another dtype than fp16
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    rows: list[dict[str, object]] = []
    for shape in args.shapes.split(","):
        n, k = map(int, shape.split("x"))
        dense = torch.nn.Linear(k, n)
        for name in args.dtypes.split(","):
            for batch in map(int, args.batches.split(",")):
                x = torch.randn(batch, k)
                x[:, [3, k // 2, k - 1]] *= 8
                x = x.to(DTYPES[name])
                cases = {"halfbyte": eight_bit(Linear8bitLt, dense, x)}
                if importlib.util.find_spec("bitsandbytes") is not None:
                    import bitsandbytes

                    cases["bitsandbytes"] = eight_bit(bitsandbytes.nn.Linear8bitLt, dense, x)
                plain = copy.deepcopy(dense).to(x.dtype)
                cases["torch dense"] = rotated(plain, x, plain.weight.numel() * x.element_size())
                check(cases, dense, x)
                timings = common.interleave(cases, repeats=args.rounds, seconds=args.seconds, clock=clock)
                for who, t in timings.items():
                    rows.append(
                        {
                            "shape": shape,
                            "dtype": name,
                            "batch": batch,
                            "who": who,
                            "min_ms": round(t.least * 1e3, 4),
                            "median_ms": round(t.median * 1e3, 4),
                            "gb_s": round(n * k / t.least / 1e9, 1) if who == "halfbyte" and batch == 1 else "",
                            "rounds": t.count,
                            "threads": args.threads,
                            "clock": "cpu" if args.cpu_time else "wall",
                            "level": host.level().name,
                        }
                    )
                line = "  ".join(f"{who} {t.least * 1e3:.3f}/{t.median * 1e3:.3f}" for who, t in timings.items())
                print(f"{shape} {name} M={batch}  ms min/median:  {line}", flush=True)
    print(common.write_csv(args.out, rows))


if __name__ == "__main__":
    main()
