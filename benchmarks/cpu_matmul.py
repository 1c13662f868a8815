"""Products with a 4-bit weight on the CPU: halfbyte, torch dense, bitsandbytes canonical and repacked, in turn.

Usage: python benchmarks/cpu_matmul.py [--threads 2] [--out NAME.csv] [--shapes 4096x4096,...] [--batches 1,4,...]
    [--peer PYTHON | --peer-path DIR]
Each process takes its turn (see ``cpu_turns.py``): halfbyte and torch, bitsandbytes' functions, and its layers. In a
turn, weights rotate over 200 MB, and each round has an order of its own. Contestants are called as functions
(``matmul_4bit``, ``F.linear``) and, with "layer" in the name, as ``Linear4bit`` and ``Linear``; bitsandbytes' layer
repacks its weight in ``eval`` mode, and is canonical in training mode. ``gb_s`` counts packed bytes and absmax.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

import common
import cpu_turns

SHAPES = "576x1536,4096x4096,11008x4096"
BATCHES = "1,2,4,8,16,32,128,512"
BLOCKSIZE = 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
FEW = 16
"""Activations up to which bitsandbytes' layers take part; for more they take as long as its functions."""

TURN = 0.03
"""Seconds that a turn lasts at least."""

Case = Callable[[int], object]


def layers_of(nn: Any, weight: torch.Tensor, count: int) -> list[torch.nn.Module]:
    """Copies of a ``Linear4bit`` out of the ``nn`` module of halfbyte or bitsandbytes."""
    rows, columns = weight.shape
    options = {"compress_statistics": False, "quant_type": "nf4"}
    layer = nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, **options)
    layer.weight = nn.Params4bit(weight.bfloat16(), requires_grad=False, **options)
    layer.to("cpu")
    return [copy.deepcopy(layer).eval() for _ in range(count)]


def rotated(layers: list[torch.nn.Module], x: torch.Tensor) -> Case:
    return lambda i: layers[i % len(layers)](x)


def copies(weight: torch.Tensor) -> int:
    return common.copies_for(weight.numel() // 2 + 4 * weight.numel() // BLOCKSIZE)


class Halfbyte:
    """halfbyte's forms, torch's dense ones, and reading alone."""

    def __init__(self, weight: torch.Tensor) -> None:
        from halfbyte import functional, nn

        self.weight = weight
        packed, state = functional.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4")
        self.nbytes = packed.numel() + 4 * state.absmax.numel()
        self.copies = [(packed.clone(), self._own(state)) for _ in range(copies(weight))]
        _, self.double = functional.quantize_4bit(
            weight, blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=True
        )
        self.layers = layers_of(nn, weight, len(self.copies))
        self.dense: dict[torch.dtype, list[torch.nn.Module]] = {}

    @staticmethod
    def _own(state: Any) -> Any:
        """The state with a copy of its scales, so that they leave the caches too."""
        own = copy.copy(state)
        own.absmax = state.absmax.clone()
        return own

    def _dense(self, dtype: torch.dtype) -> list[torch.nn.Module]:
        if dtype not in self.dense:
            self.dense = {dtype: []}
            for _ in range(common.copies_for(self.weight.numel() * dtype.itemsize)):
                layer = torch.nn.Linear(*self.weight.shape[::-1], bias=False, device="meta")
                layer.weight = torch.nn.Parameter(self.weight.to(dtype, copy=True), requires_grad=False)
                self.dense[dtype].append(layer)
        return self.dense[dtype]

    def cases(self, x: torch.Tensor) -> dict[str, Case]:
        """Who -> product with ``x``."""
        import cpu_read
        from halfbyte import matmul_4bit

        count, dense = len(self.copies), self._dense(x.dtype)

        def plain(i: int) -> object:
            packed, state = self.copies[i % count]
            return matmul_4bit(x, packed.t(), quant_state=state)

        def double(i: int) -> object:
            return matmul_4bit(x, self.copies[i % count][0].t(), quant_state=self.double)

        def read(i: int) -> None:
            packed, state = self.copies[i % count]
            cpu_read.read((packed, state.absmax))

        found: dict[str, Case] = {
            "halfbyte": plain,
            "halfbyte nested": double,
            "torch dense": lambda i: linear(x, dense[i % len(dense)].weight),
        }
        if x.dtype == torch.bfloat16:
            for layer in self.layers:  # the first call looks up what the others repeat
                layer(x)
            found |= {"halfbyte layer": rotated(self.layers, x), "torch layer": rotated(dense, x)}
        return found | ({"reading alone": read} if x.shape[0] == 1 else {})


class Functions:
    """bitsandbytes' ``matmul_4bit``."""

    def __init__(self, weight: torch.Tensor) -> None:
        from bitsandbytes import functional as F

        packed, self.state = F.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4")
        self.canonical = [packed.clone() for _ in range(copies(weight))]
        self.repacked: list[torch.Tensor] = []
        if F.has_avx512bf16() and weight.shape[0] % 32 == 0:
            _, self.other = F.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4")
            self.other.dtype = torch.bfloat16
            again, self.other = F._convert_weight_packed_for_cpu(packed.clone(), self.other)
            self.repacked = [again.clone() for _ in self.canonical]

    def cases(self, x: torch.Tensor) -> dict[str, Case]:
        from bitsandbytes import matmul_4bit

        count = len(self.canonical)
        found: dict[str, Case] = {
            "bitsandbytes canonical": lambda i: matmul_4bit(x, self.canonical[i % count].t(), quant_state=self.state)
        }
        if self.repacked and x.dtype == torch.bfloat16:
            found["bitsandbytes repacked"] = lambda i: matmul_4bit(x, self.repacked[i % count], quant_state=self.other)
        return found


class Layers:
    """bitsandbytes' ``Linear4bit``."""

    def __init__(self, weight: torch.Tensor) -> None:
        from bitsandbytes import functional, nn

        self.canonical = layers_of(nn, weight, copies(weight))
        for layer in self.canonical:
            layer.train()
        repacks = functional.has_avx512bf16() and weight.shape[0] % 32 == 0
        self.repacked = layers_of(nn, weight, copies(weight)) if repacks else []

    def cases(self, x: torch.Tensor) -> dict[str, Case]:
        if x.shape[0] > FEW or x.dtype != torch.bfloat16:
            return {}
        for layer in self.repacked:  # repacked at the first call
            layer(x[:1])
        found = {"bitsandbytes layer canonical": rotated(self.canonical, x)}
        return found | ({"bitsandbytes layer repacked": rotated(self.repacked, x)} if self.repacked else {})


class Side:
    """What one process does in its turn."""

    def __init__(self, threads: int, kind: type[Halfbyte | Functions | Layers]) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        self._kind, self._order = kind, random.Random(0)

    def version(self) -> dict[str, str]:
        return {"bitsandbytes": importlib.metadata.version("bitsandbytes")}

    def shape(self, rows: str, columns: str) -> dict[str, object]:
        self._columns = int(columns)
        self.forms: Any = None  # frees those of the shape before
        self.forms = self._kind(torch.randn(int(rows), self._columns) * 0.02)
        return {}

    def batch(self, dtype: str, batch: str) -> dict[str, object]:
        self._cases, self._rounds = self.forms.cases(torch.randn(int(batch), self._columns).to(DTYPES[dtype])), 0
        self._round({name: [] for name in self._cases})
        return {}

    def turn(self) -> dict[str, list[float]]:
        """Seconds of calls of each, in as many rounds as fit."""
        taken: dict[str, list[float]] = {name: [] for name in self._cases}
        torch.ones(1 << 17).add_(1)  # wakes torch's threads
        begun = time.perf_counter()
        while taken:
            self._round(taken)
            if time.perf_counter() - begun > TURN:
                break
        return taken

    def _round(self, taken: dict[str, list[float]]) -> None:
        names = list(self._cases)
        self._order.shuffle(names)
        for name in names:
            case = self._cases[name]
            start = time.perf_counter()
            case(self._rounds)
            taken[name].append(time.perf_counter() - start)
        self._rounds += 1


def measure(sides: list[Any], args: argparse.Namespace, dtype: str, batch: str) -> dict[str, list[float]]:
    for side in sides:
        side("batch", dtype, batch)
    taken: dict[str, list[float]] = {}
    begun = time.perf_counter()
    for number in range(args.turns):
        for side in sides:
            cpu_turns.rest()
            for who, seconds in side("turn").items():
                taken.setdefault(who, []).extend(seconds)
        if number >= 2 and time.perf_counter() - begun > args.seconds:
            break
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--batches", default=BATCHES)
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--seconds", type=float, default=4.0, help="at most, for one shape, dtype and batch")
    parser.add_argument("--turns", type=int, default=30, help="at most")
    parser.add_argument("--out", default="cpu_matmul.csv")
    cpu_turns.add_arguments(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        cpu_turns.answer(Side(args.threads, {"functions": Functions, "layers": Layers}[args.child]))
        return
    from halfbyte.backends.cpu import host

    own = Side(args.threads, Halfbyte)
    sides: list[Any] = [lambda word, *rest: getattr(own, word)(*rest)]
    peers: list[cpu_turns.Peer] = []
    if args.peer or args.peer_path:
        for kind in ("functions", "layers"):
            words = [args.peer or sys.executable, __file__, "--child", kind, "--threads", str(args.threads)]
            peer = cpu_turns.Peer(kind, words, cpu_turns.environment(args, foreign=True))
            peer.ask("")
            common.facts().update(peer.ask("version"))
            peers.append(peer)
            sides.append(lambda *words, peer=peer: peer.ask(" ".join(words)))
    rows: list[dict[str, object]] = []
    for shape in args.shapes.split(","):
        for side in sides:
            side("shape", *shape.split("x"))
        for dtype in args.dtypes.split(","):
            for batch in args.batches.split(","):
                line = f"{shape} {dtype} M={batch}  ms min/median:"
                for who, taken in measure(sides, args, dtype, batch).items():
                    least, median = min(taken) * 1e3, sorted(taken)[len(taken) // 2] * 1e3
                    read = batch == "1" and who in {"halfbyte", "halfbyte layer", "reading alone"}
                    row = {"shape": shape, "dtype": dtype, "batch": batch, "who": who}
                    row |= {"min_ms": round(least, 4), "median_ms": round(median, 4)}
                    row["gb_s"] = round(own.forms.nbytes / least / 1e6, 1) if read else ""
                    rows.append({**row, "rounds": len(taken), "threads": args.threads, "level": host.level().name})
                    line += f"  {who} {least:.3f}/{median:.3f}"
                print(line, flush=True)
                written = common.write_csv(args.out, rows)
    for peer in peers:
        peer.close()
    print(written)


if __name__ == "__main__":
    main()
