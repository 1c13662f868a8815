"""Products with a 4-bit weight on the CPU: halfbyte, torch dense, bitsandbytes canonical and repacked, interleaved.

Usage: python benchmarks/cpu_matmul.py [--threads 2] [--out NAME.csv] [--shapes 4096x4096,...] [--batches 1,4,...]
bitsandbytes takes part where it can be imported. Weights rotate over 200 MB. ``gb_s`` counts packed bytes and absmax.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable

import torch
from torch.nn.functional import linear

import common
import halfbyte.backends  # noqa: F401  (defines and binds torch.ops.halfbyte)
from halfbyte.backends.cpu import host

SHAPES = "4096x4096,11008x4096,576x1536"
BATCHES = "1,2,4,8,16,32,128,512"
BLOCKSIZE = 64
Case = Callable[[int], object]


def nested(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double-quantized absmax as the ops take it."""
    from halfbyte.formats.dynamic import dynamic_map

    code = torch.from_numpy(dynamic_map())
    offset = absmax.mean()
    codes, second = torch.ops.halfbyte.quantize_blockwise(absmax - offset, code, 256)
    return second, codes, code, offset


def ours(weight: torch.Tensor, x: torch.Tensor) -> tuple[dict[str, Case], int]:
    """halfbyte with plain and nested absmax, and the bytes that one product reads."""
    op = torch.ops.halfbyte
    packed, absmax = op.quantize_4bit(weight, BLOCKSIZE, "nf4", torch.uint8)
    nbytes = packed.numel() + 4 * absmax.numel()
    copies = [(packed.clone(), absmax.clone()) for _ in range(common.copies_for(nbytes))]
    second = nested(absmax)
    shape = list(weight.shape)

    def plain(i: int) -> object:
        p, a = copies[i % len(copies)]
        return op.gemm_4bit(x, p, shape, a, BLOCKSIZE, "nf4")

    def double(i: int) -> object:
        return op.gemm_4bit(x, copies[i % len(copies)][0], shape, second[0], BLOCKSIZE, "nf4", None, *second[1:])

    return {"halfbyte": plain, "halfbyte nested": double}, nbytes


def dense(weight: torch.Tensor, x: torch.Tensor) -> dict[str, Case]:
    """torch on the unquantized weight, in the activations' dtype."""
    copies = [weight.to(x.dtype) for _ in range(common.copies_for(weight.numel() * x.element_size()))]
    return {"torch dense": lambda i: linear(x, copies[i % len(copies)])}


def peer(weight: torch.Tensor, x: torch.Tensor) -> dict[str, Case]:
    """bitsandbytes as it comes (canonical bytes), and with its destructive repacking where the CPU has that path."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    import bitsandbytes as bnb
    from bitsandbytes import functional as F

    packed, state = F.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4")
    copies = [packed.clone() for _ in range(common.copies_for(packed.numel()))]
    cases: dict[str, Case] = {
        "bitsandbytes canonical": lambda i: bnb.matmul_4bit(x, copies[i % len(copies)].t(), quant_state=state)
    }
    if F.has_avx512bf16() and x.dtype == torch.bfloat16 and weight.shape[0] % 32 == 0:
        _, other = F.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4")
        other.dtype = torch.bfloat16
        repacked, other = F._convert_weight_packed_for_cpu(packed.clone(), other)
        again = [repacked.clone() for _ in range(len(copies))]
        cases["bitsandbytes repacked"] = lambda i: bnb.matmul_4bit(x, again[i % len(again)], quant_state=other)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--batches", default=BATCHES)
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--seconds", type=float, default=4.0, help="at most, for one shape, dtype and batch")
    parser.add_argument("--out", default="cpu_matmul.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    rows: list[dict[str, object]] = []
    for shape in args.shapes.split(","):
        n, k = map(int, shape.split("x"))
        weight = torch.randn(n, k) * 0.02
        for name in args.dtypes.split(","):
            dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[name]
            for batch in map(int, args.batches.split(",")):
                x = torch.randn(batch, k).to(dtype)
                mine, nbytes = ours(weight, x)
                cases = {**mine, **dense(weight, x), **peer(weight, x)}
                timings = common.interleave(cases, seconds=args.seconds)
                for who, t in timings.items():
                    packed = who.startswith("halfbyte") or who.endswith("repacked")
                    rows.append(
                        {
                            "shape": shape,
                            "dtype": name,
                            "batch": batch,
                            "who": who,
                            "min_ms": round(t.least * 1e3, 4),
                            "median_ms": round(t.median * 1e3, 4),
                            "gb_s": round(nbytes / t.least / 1e9, 1) if packed and batch == 1 else "",
                            "rounds": t.count,
                            "threads": args.threads,
                            "level": host.level().name,
                        }
                    )
                line = "  ".join(f"{who} {t.least * 1e3:.3f}/{t.median * 1e3:.3f}" for who, t in timings.items())
                print(f"{shape} {name} M={batch}  ms min/median:  {line}", flush=True)
    print(common.write_csv(args.out, rows))


if __name__ == "__main__":
    main()
