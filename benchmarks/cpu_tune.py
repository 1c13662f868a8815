"""Measures the constants of ``backends/cpu`` on this machine: where slices overtake the fused product, sizes, prefetch.

Usage: python benchmarks/cpu_tune.py [--threads 2]. Prints tables; the constants themselves are data in
``backends/cpu/matmul.py`` and ``backends/cpu/kernels/product.py``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import common
from halfbyte.backends.cpu import call, compiler, four_bit, host, matmul
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


def with_value(owner: object, name: str, value: object, case: Case) -> Case:
    def run(i: int) -> object:
        setattr(owner, name, value)
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
    fused, sliced = (lambda _: 1 << 30), (lambda _: 0)
    default_tile = matmul._tile
    for name, dtype in DTYPES.items():
        plain = dense.to(dtype)
        for batch in (2, 4, 8, 16, 32, 64, 128):
            x = torch.randn(batch, 4096).to(dtype)
            cases: dict[str, Case] = {"dense": lambda _, x=x, w=plain: torch.nn.functional.linear(x, w)}
            for tile in (4, 8):
                case = with_value(matmul, "_fused_batch", fused, lambda i, x=x: weight.multiply(x, i))
                if batch >= tile // 2 and batch <= 64:
                    cases[f"tile {tile}"] = with_value(matmul, "_tile", lambda _, tile=tile: tile, case)
            for size in (1, 4, 16, 64):
                case = with_value(matmul, "_fused_batch", sliced, lambda i, x=x: weight.multiply(x, i))
                cases[f"slices {size}M"] = with_value(matmul, "SLICE_BYTES", size << 20, case)
            report(f"{name} M={batch}", cases, args.seconds)
    matmul._tile, matmul._fused_batch = default_tile, fused
    for name, dtype in DTYPES.items():
        x = torch.randn(8, 4096).to(dtype)
        sizes = {
            f"panel {size}K": with_value(matmul, "PANEL_BYTES", size << 10, lambda i, x=x: weight.multiply(x, i))
            for size in (8, 16, 24, 32, 1024)
        }
        report(f"{name} M=8", sizes, args.seconds)
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
    real = matmul.kernel

    def chosen(name: str, **variant: object) -> call.Kernel:
        return function if name == "product_4bit" else real(name, **variant)

    return with_value(matmul, "kernel", chosen, lambda i: weight.multiply(x, i))


if __name__ == "__main__":
    main()
