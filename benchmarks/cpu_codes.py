"""Quantizing and dequantizing on the CPU against bitsandbytes: 4-bit NF4 and 8-bit blockwise, interleaved.

Usage: python benchmarks/cpu_codes.py [--threads 2] [--out NAME.csv] [--shape 4096x4096]
Every result is a fresh tensor, as in use; "into" means into memory that was touched before.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable

import torch

import common
import halfbyte.backends  # noqa: F401  (defines and binds torch.ops.halfbyte)
from halfbyte.backends.cpu import host
from halfbyte.formats.dynamic import dynamic_map

BLOCKSIZE = 64
Case = Callable[[int], object]


def cases_for(weight: torch.Tensor) -> dict[str, dict[str, Case]]:
    """Job -> who -> call."""
    op, dtype, shape = torch.ops.halfbyte, weight.dtype, list(weight.shape)
    packed, absmax = op.quantize_4bit(weight, BLOCKSIZE, "nf4", torch.uint8)
    code = torch.from_numpy(dynamic_map())
    codes, scales = op.quantize_blockwise(weight, code, 256)
    into = torch.empty_like(weight)
    jobs: dict[str, dict[str, Case]] = {
        "quantize_4bit": {"halfbyte": lambda _: op.quantize_4bit(weight, BLOCKSIZE, "nf4", torch.uint8)},
        "dequantize_4bit": {
            "halfbyte": lambda _: op.dequantize_4bit(packed, absmax, BLOCKSIZE, "nf4", shape, dtype),
            "halfbyte into": lambda _: op.dequantize_4bit.out(packed, absmax, BLOCKSIZE, "nf4", shape, dtype, out=into),
        },
        "quantize_blockwise 256": {"halfbyte": lambda _: op.quantize_blockwise(weight, code, 256)},
        "quantize_blockwise 4096": {"halfbyte": lambda _: op.quantize_blockwise(weight, code, 4096)},
        "dequantize_blockwise 256": {"halfbyte": lambda _: op.dequantize_blockwise(codes, scales, code, 256, dtype)},
    }
    jobs["dequantize_4bit"]["torch copy"] = lambda _: weight.clone()
    if importlib.util.find_spec("bitsandbytes") is not None:
        from bitsandbytes import functional as F

        theirs, state = F.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4")
        peer = "bitsandbytes"
        jobs["quantize_4bit"][peer] = lambda _: F.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4")
        jobs["dequantize_4bit"][peer] = lambda _: F.dequantize_4bit(theirs, state)
        for blocksize in (256, 4096):
            jobs[f"quantize_blockwise {blocksize}"][peer] = lambda _, b=blocksize: F.quantize_blockwise(
                weight, code, blocksize=b
            )
        eight, state8 = F.quantize_blockwise(weight, code, blocksize=256)
        jobs["dequantize_blockwise 256"][peer] = lambda _: F.dequantize_blockwise(eight, state8)
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", default="4096x4096")
    parser.add_argument("--seconds", type=float, default=4.0, help="at most, for one job and dtype")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time on one thread, for a machine in use")
    parser.add_argument("--out", default="cpu_codes.csv")
    args = parser.parse_args()
    args.threads = 1 if args.cpu_time else args.threads
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    rows: list[dict[str, object]] = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        weight = (torch.randn(*map(int, args.shape.split("x"))) * 0.02).to(dtype)
        for job, cases in cases_for(weight).items():
            timings = common.interleave(cases, seconds=args.seconds, clock=clock)
            for who, t in timings.items():
                rows.append(
                    {
                        "job": job,
                        "shape": args.shape,
                        "dtype": name,
                        "who": who,
                        "min_ms": round(t.least * 1e3, 4),
                        "median_ms": round(t.median * 1e3, 4),
                        "rounds": t.count,
                        "threads": args.threads,
                        "level": host.level().name,
                        "clock": "cpu" if args.cpu_time else "wall",
                    }
                )
            line = "  ".join(f"{who} {t.least * 1e3:.3f}/{t.median * 1e3:.3f}" for who, t in timings.items())
            print(f"{job} {name}  ms min/median:  {line}", flush=True)
            written = common.write_csv(args.out, rows)
    print(written)


if __name__ == "__main__":
    main()
