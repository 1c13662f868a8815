"""Products with a 4-bit weight on the CPU: halfbyte, torch dense, bitsandbytes canonical and repacked, interleaved.

Usage: python benchmarks/cpu_matmul.py [--threads 2] [--out NAME.csv] [--shapes 4096x4096,...] [--batches 1,4,...]
bitsandbytes takes part where it can be imported. Weights rotate over 200 MB, and each round has an order of its own.
Called as functions (``matmul_4bit``, ``F.linear``) and, with "layer" in the name, as ``Linear4bit`` and ``Linear``;
bitsandbytes' layer repacks its weight in ``eval`` mode, and is canonical in training mode. ``gb_s`` counts packed
bytes and absmax.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

import common
import cpu_read
from halfbyte import functional, matmul_4bit, nn
from halfbyte.backends.cpu import host
from halfbyte.quant_state import QuantState

SHAPES = "4096x4096,11008x4096,576x1536"
BATCHES = "1,2,4,8,16,32,128,512"
BLOCKSIZE = 64
Case = Callable[[int], object]
FEW = 16
"""Activations up to which bitsandbytes' layers take part; for more they take as long as its functions."""


def _quantized(layers: Any, weight: torch.Tensor) -> torch.nn.Module:
    """A ``Linear4bit`` out of the ``nn`` module of halfbyte or bitsandbytes."""
    rows, columns = weight.shape
    layer = layers.Linear4bit(
        columns, rows, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = layers.Params4bit(
        weight.bfloat16(), requires_grad=False, compress_statistics=False, quant_type="nf4"
    )
    return layer.to("cpu")


def _with_own_scales(state: QuantState) -> QuantState:
    """The state with a copy of its scales, so that they leave the caches too."""
    own = copy.copy(state)
    own.absmax = state.absmax.clone()
    return own


class Contestants:
    """One weight in every form, copied often enough to leave the caches."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        packed, state = functional.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4")
        self.nbytes = packed.numel() + 4 * state.absmax.numel()
        count = common.copies_for(self.nbytes)
        self.copies = [(packed.clone(), _with_own_scales(state)) for _ in range(count)]
        _, self.double = functional.quantize_4bit(
            weight, blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=True
        )
        self.layers = {"halfbyte layer": self._copies(_quantized(nn, weight).eval())}
        self.dense: dict[torch.dtype, list[torch.Tensor]] = {}
        self.peer = importlib.util.find_spec("bitsandbytes") is not None
        if self.peer:
            from bitsandbytes import functional as F

            theirs, self.state = F.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4")
            self.theirs = [theirs.clone() for _ in self.copies]
            self.repacked: list[torch.Tensor] = []
            if F.has_avx512bf16() and weight.shape[0] % 32 == 0:
                _, self.other = F.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4")
                self.other.dtype = torch.bfloat16
                again, self.other = F._convert_weight_packed_for_cpu(theirs.clone(), self.other)
                self.repacked = [again.clone() for _ in self.copies]
            import bitsandbytes

            layer = _quantized(bitsandbytes.nn, weight)
            self.layers["bitsandbytes layer canonical"] = self._copies(layer.train())
            if self.repacked:
                self.layers["bitsandbytes layer repacked"] = self._copies(copy.deepcopy(layer).eval())

    def _copies(self, layer: torch.nn.Module) -> list[torch.nn.Module]:
        return [copy.deepcopy(layer) for _ in self.copies]

    def layer_cases(self, x: torch.Tensor) -> dict[str, Case]:
        """Who -> product with ``x`` by a layer that has been used before."""
        dense = [torch.nn.Linear(*self.weight.shape[::-1], bias=False, device="meta") for _ in self.dense[x.dtype]]
        for layer, weight in zip(dense, self.dense[x.dtype], strict=True):
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        few = x.shape[0] <= FEW
        every = {"torch layer": dense} | {who: o for who, o in self.layers.items() if few or who == "halfbyte layer"}
        for who, layers in every.items():
            for layer in layers:  # what is done once: learning the call, repacking
                layer(x if who == "halfbyte layer" else x[:1])
        return {who: lambda i, layers=layers: layers[i % len(layers)](x) for who, layers in every.items()}

    def cases(self, x: torch.Tensor) -> dict[str, Case]:
        """Who -> product with ``x``."""
        count = len(self.copies)
        if x.dtype not in self.dense:
            copies = common.copies_for(self.weight.numel() * x.element_size())
            self.dense = {x.dtype: [self.weight.to(x.dtype) for _ in range(copies)]}
        dense = self.dense[x.dtype]

        def plain(i: int) -> object:
            packed, state = self.copies[i % count]
            return matmul_4bit(x, packed.t(), quant_state=state)

        def double(i: int) -> object:
            return matmul_4bit(x, self.copies[i % count][0].t(), quant_state=self.double)

        found: dict[str, Case] = {
            "halfbyte": plain,
            "halfbyte nested": double,
            "torch dense": lambda i: linear(x, dense[i % len(dense)]),
        }
        if x.numel() == x.shape[-1]:
            found["reading alone"] = lambda i: cpu_read.read(
                (self.copies[i % count][0], self.copies[i % count][1].absmax)
            )
        if self.peer:
            import bitsandbytes as bnb

            found["bitsandbytes canonical"] = lambda i: bnb.matmul_4bit(
                x, self.theirs[i % count].t(), quant_state=self.state
            )
            if self.repacked and x.dtype == torch.bfloat16:
                found["bitsandbytes repacked"] = lambda i: bnb.matmul_4bit(
                    x, self.repacked[i % count], quant_state=self.other
                )
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--batches", default=BATCHES)
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--seconds", type=float, default=4.0, help="at most, for one shape, dtype and batch")
    parser.add_argument("--rounds", type=int, default=60, help="at most")
    parser.add_argument("--out", default="cpu_matmul.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    rows: list[dict[str, object]] = []
    for shape in args.shapes.split(","):
        n, k = map(int, shape.split("x"))
        contestants = Contestants(torch.randn(n, k) * 0.02)
        for name in args.dtypes.split(","):
            dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[name]
            for batch in map(int, args.batches.split(",")):
                x = torch.randn(batch, k).to(dtype)
                cases = contestants.cases(x)
                if dtype == torch.bfloat16:
                    cases |= contestants.layer_cases(x)
                timings = common.interleave(cases, repeats=args.rounds, seconds=args.seconds, shuffled=True)
                for who, t in timings.items():
                    packed = who in {"halfbyte", "halfbyte layer", "reading alone"}
                    rows.append(
                        {
                            "shape": shape,
                            "dtype": name,
                            "batch": batch,
                            "who": who,
                            "min_ms": round(t.least * 1e3, 4),
                            "median_ms": round(t.median * 1e3, 4),
                            "gb_s": round(contestants.nbytes / t.least / 1e9, 1) if packed and batch == 1 else "",
                            "rounds": t.count,
                            "threads": args.threads,
                            "level": host.level().name,
                        }
                    )
                line = "  ".join(f"{who} {t.least * 1e3:.3f}/{t.median * 1e3:.3f}" for who, t in timings.items())
                print(f"{shape} {name} M={batch}  ms min/median:  {line}", flush=True)
                written = common.write_csv(args.out, rows)
    print(written)


if __name__ == "__main__":
    main()
