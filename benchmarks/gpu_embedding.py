"""Quantized embedding tables and output heads on a GPU: gathering rows, and logits over whole vocabularies.

Run: ``python benchmarks/gpu_embedding.py [--out FOLDER] [--seconds N]`` from a source folder, on a machine with a GPU,
with bitsandbytes importable where it should be compared. Results are checked before anything is timed. Times are
CUDA-graph replays over tables that rotate past the level-2 cache, medians, in microseconds; ``peak`` is the memory that
a call needed beside its operands and its result; ``peer`` is bitsandbytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import copies_for, write_csv
from benchmarks.gpu_4bit import Exact, graph_time
from halfbyte.backends import registry  # noqa: F401 - binds the ops

TABLES = {"SmolLM2": (49152, 576), "Llama-3 8B": (128256, 4096), "Qwen2.5 7B": (152064, 3584)}
"""Rows and columns of embedding tables and heads."""

BATCHES = (1, 64, 8, 512)
"""Rows of a head's input."""

TOKENS = (1, 4096, 512)
"""Rows gathered."""

ops = torch.ops.halfbyte


def peak(call: Callable[[], Tensor]) -> int:
    """Bytes allocated at most during ``call``, beside what it returns."""
    result = call()
    torch.cuda.synchronize()
    kept = result.numel() * result.element_size()
    del result
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - kept)


def timed(calls: list[Callable[[], Any]]) -> float | str:
    """Microseconds of one; the error's name where a call cannot be captured or fails."""
    try:
        return round(graph_time(calls), 2)
    except Exception as error:  # another library's own limit is a result
        torch.cuda.synchronize()
        return type(error).__name__


def head(model: str, rows: int, columns: int, weights: list[Tensor], packed: list[Any], peer: Any) -> Iterator[Any]:
    """One row for each batch."""
    exact = Exact.of(rows, columns, *packed[0])
    for batch in BATCHES:
        x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
        error = exact.forward(x, ops.gemm_4bit(x, packed[0][0], [rows, columns], packed[0][1], 64, "nf4"))
        extra = peak(lambda x=x: ops.gemm_4bit(x, packed[0][0], [rows, columns], packed[0][1], 64, "nf4"))
        row = {"case": "head", "model": model, "rows": rows, "columns": columns, "batch": batch, "error": error}
        row["peak"], row["table_bf16"] = extra, rows * columns * 2
        row["halfbyte"] = timed(
            [lambda p=p, x=x: ops.gemm_4bit(x, p[0], [rows, columns], p[1], 64, "nf4") for p in packed]
        )
        row["torch_bf16"] = timed([lambda w=w, x=x: F.linear(x, w) for w in weights])
        row["peer"] = "" if peer is None else timed([lambda p=p, x=x: peer.matmul(x, *p) for p in packed])
        yield row


def gather(model: str, rows: int, columns: int, weights: list[Tensor], packed: list[Any], peer: Any) -> Iterator[Any]:
    """One row for each number of tokens."""
    format_ = (64, "nf4", torch.bfloat16)
    for tokens in TOKENS:
        ids = torch.randint(0, rows, (tokens,), device="cuda")
        want = ops.dequantize_4bit(*packed[0], 64, "nf4", [rows, columns], torch.bfloat16)[ids]
        if not torch.equal(ops.embedding_4bit(ids, packed[0][0], [rows, columns], packed[0][1], *format_), want):
            raise SystemExit(f"wrong rows, nothing is timed: {model}")
        calls = [lambda p=p, i=ids: ops.embedding_4bit(i, p[0], [rows, columns], p[1], *format_) for p in packed]
        row = {"case": "gather", "model": model, "rows": rows, "columns": columns, "batch": tokens, "error": 0.0}
        row |= {"peak": peak(calls[0]), "table_bf16": rows * columns * 2, "halfbyte": timed(calls)}
        row["torch_bf16"] = timed([lambda w=w, i=ids: F.embedding(i, w) for w in weights])
        row["peer"] = "" if peer is None else timed([lambda t=t, i=ids: t(i) for t in peer.tables])
        yield row


def measure(*table: Any) -> Iterator[Any]:
    """Looking up, then logits."""
    yield from gather(*table)
    yield from head(*table)


class Peer:
    """bitsandbytes on the same tables."""

    def __init__(self, weights: list[Tensor], packed: list[Any]) -> None:
        import bitsandbytes

        self._functional, self._matmul = bitsandbytes.functional, bitsandbytes.matmul_4bit
        self._state = self._functional.quantize_4bit(weights[0], quant_type="nf4")[1]
        self._states: dict[int, Any] = {}
        self.tables: list[Any] = []
        for weight in weights[:2]:
            table = bitsandbytes.nn.EmbeddingNF4(*weight.shape, dtype=torch.bfloat16, device="cuda")
            table.weight.data = weight.clone()
            self.tables.append(table.to("cuda"))
        del packed

    def matmul(self, x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
        """Their product with our codes, which are theirs."""
        state = self._states.get(absmax.data_ptr())
        if state is None:
            own = self._state
            state = self._functional.QuantState(absmax, own.shape, own.code, own.blocksize, own.quant_type, own.dtype)
            self._states[absmax.data_ptr()] = state
        return self._matmul(x, codes.t(), state)


def main() -> int:
    """Measure every table while there is time."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--out", type=Path)
    words.add_argument("--seconds", type=float, default=60.0)
    given = words.parse_args()
    deadline = time.monotonic() + given.seconds
    found: list[dict[str, Any]] = []
    for model, (rows, columns) in TABLES.items():
        if time.monotonic() > deadline:
            print("out of time before", model, flush=True)
            break
        weights = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(2)]
        copies = copies_for(rows * columns // 2)
        packed = [ops.quantize_4bit(weights[i % 2], 64, "nf4", torch.uint8) for i in range(copies)]
        peer = Peer(weights, packed) if importlib.util.find_spec("bitsandbytes") else None
        for row in measure(model, rows, columns, weights, packed, peer):
            print(" ".join(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)
            found.append(row)
            if given.out:
                write_csv("gpu_embedding.csv", found, given.out)
            if time.monotonic() > deadline:
                break
    return 0


if __name__ == "__main__":
    sys.exit(main())
