"""Measures the constants of ``backends/cpu`` on this machine: where slices overtake the fused product, sizes, prefetch.

Usage: python benchmarks/cpu_tune.py [--threads 2]. Prints tables; the constants themselves are data in
``backends/cpu/matmul.py``, ``fused.py``, ``tiled.py``, ``sliced.py`` and ``kernels/product.py``.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import common
from halfbyte.backends.cpu import call, compiler, four_bit, fused, host, matmul, sliced, tiled
from halfbyte.backends.cpu.kernels import product

Case = Callable[[int], object]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Weight:
    """Rotating copies of one packed weight."""

    def __init__(self, n: int, k: int) -> None:
        self.shape = (n, k)
        packed, absmax = four_bit.quantize_4bit(torch.randn(n, k), 64, "nf4", torch.uint8)
        count = common.copies_for(packed.numel() + 4 * absmax.numel())
        self.copies = [(packed.clone(), absmax.clone()) for _ in range(count)]

    def multiply(self, x: torch.Tensor, i: int) -> torch.Tensor:
        packed, absmax = self.copies[i % len(self.copies)]
        return matmul.gemm_4bit(x, packed, self.shape, absmax, 64, "nf4")


def report(title: str, cases: dict[str, Case], seconds: float) -> None:
    timings = common.interleave(cases, repeats=40, seconds=seconds)
    print(
        f"{title}:  " + "  ".join(f"{k} {t.least * 1e3:.3f}/{t.median * 1e3:.3f}" for k, t in timings.items()),
        flush=True,
    )


def with_values(case: Case, *settings: tuple[object, str, object]) -> Case:
    """The case with attributes of modules set first: (module, name, value)."""

    def run(i: int) -> object:
        for owner, name, value in settings:
            setattr(owner, name, value)
        matmul._planned.cache_clear()
        return case(i)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="at most, for one line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    weight, level = Weight(4096, 4096), host.level()
    dense = torch.randn(4096, 4096)
    print(level.name, common.facts())
    always, never = (lambda _: 1 << 30), (lambda _: 0)
    default_tile, default_least, default_rows = fused._tile, tiled.LEAST, fused.ROWS_BATCH
    for name, dtype in DTYPES.items():
        plain = dense.to(dtype)
        for batch in (1, 2, 3, 4, 8, 16, 32, 64, 128, 512):
            x = torch.randn(batch, 4096).to(dtype)
            multiply = functools.partial(weight.multiply, x)
            cases: dict[str, Case] = {"dense": lambda _, x=x, w=plain: torch.nn.functional.linear(x, w)}
            vectors = with_values(multiply, (fused, "ROWS_BATCH", 0), (tiled, "LEAST", 1 << 30))
            for tile in (4, 8):
                if tile // 2 <= batch <= 64:
                    one = (fused, "_tile", lambda _, tile=tile: tile)
                    cases[f"tile {tile}"] = with_values(vectors, (matmul, "_fused_batch", always), one)
            for size in (1, 4, 16, 64):
                slices = (sliced, "SLICE_BYTES", size << 20)
                cases[f"slices {size}M"] = with_values(vectors, (matmul, "_fused_batch", never), slices)
            if level.wide_rows and batch <= 4:
                cases["rows"] = with_values(multiply, (fused, "ROWS_BATCH", 4), (fused, "_tile", default_tile))
            if level.matrix and dtype == torch.bfloat16:
                cases["matrix unit"] = with_values(multiply, (fused, "ROWS_BATCH", 0), (tiled, "LEAST", 1))
            report(f"{name} M={batch}", cases, args.seconds)
    fused._tile, tiled.LEAST, fused.ROWS_BATCH, matmul._fused_batch = default_tile, default_least, default_rows, always
    for name, dtype in DTYPES.items():
        x = torch.randn(8, 4096).to(dtype)
        sizes = {
            f"panel {size}K": with_values(
                lambda i, x=x: weight.multiply(x, i), (fused, "PANEL_BYTES", size << 10), (tiled, "LEAST", 1 << 30)
            )
            for size in (8, 16, 24, 32, 1024)
        }
        report(f"{name} M=8", sizes, args.seconds)
    if level.wide_rows:
        return  # the kernel below serves one activation only where rows do not
    for name, dtype in DTYPES.items():
        x = torch.randn(1, 4096).to(dtype)
        cases = {}
        for distance in (256, 1024, 2048, 4096, 8192):
            product.PREFETCH = distance
            call._kernel.cache_clear()
            with tempfile.TemporaryDirectory() as folder:
                compiler.cache_directory = lambda folder=folder: Path(folder)
                function = call._kernel("product_4bit", level, _variant(name))
            cases[f"prefetch {distance}"] = _once(function, x, weight)
        report(f"{name} M=1", cases, 2 * args.seconds)


def _variant(name: str) -> tuple[tuple[str, object], ...]:
    return (("dtype", {"bf16": "bf16", "fp32": "f32"}[name]), ("nested", False), ("halves", False), ("tile", 1))


def _once(function: call.Kernel, x: torch.Tensor, weight: Weight) -> Case:
    real = fused._chunk_kernels

    def chosen(*key: object) -> tuple[call.Kernel, call.Kernel, int]:
        prepare, _, size = real(*key)
        return prepare, function, size

    return with_values(lambda i: weight.multiply(x, i), (fused, "_chunk_kernels", chosen))


if __name__ == "__main__":
    main()
