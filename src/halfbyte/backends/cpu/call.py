"""Kernels by name and variant: written, compiled and kept at first use, then called with a list of numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.backends.cpu import compiler, host, threads
from halfbyte.backends.cpu.kernels import blockwise, dequantize, int8, optimizer, product, quantize, rows, tiles
from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.level import Level

__all__ = ["DTYPES", "KERNELS", "Kernel", "Product", "Variant", "kernel", "write"]

Variant = tuple[str, dict[str, Any]]
"""Name of a kernel and what its writer is told."""

Product = Callable[[int, int, int, int, tuple[int, ...]], None]
"""A product of known sizes: takes the address of the activations, bytes between their rows, the addresses of the
contiguous result and of the packed weight, and ``Weight.inputs``."""

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""How the kernels call the dtypes of activations."""

KERNELS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "quantize_4bit": (quantize.emit, quantize.ARGUMENTS),
    "dequantize_4bit": (dequantize.emit, dequantize.ARGUMENTS),
    "prepare": (product.emit_prepare, product.PREPARE_ARGUMENTS),
    "product_4bit": (product.emit, product.ARGUMENTS),
    "product_rows": (rows.emit, rows.ARGUMENTS),
    "prepare_tiles": (tiles.emit_prepare, tiles.PREPARE_ARGUMENTS),
    "product_tiles": (tiles.emit, tiles.ARGUMENTS),
    "quantize_blockwise": (blockwise.emit_quantize, blockwise.QUANTIZE_ARGUMENTS),
    "dequantize_blockwise": (blockwise.emit_dequantize, blockwise.DEQUANTIZE_ARGUMENTS),
    "quantize_int8": (int8.emit_quantize, int8.QUANTIZE_ARGUMENTS),
    "product_int8": (int8.emit_product, int8.PRODUCT_ARGUMENTS),
    "optimizer_8bit": (optimizer.emit_8bit, optimizer.ARGUMENTS_8BIT),
    "optimizer_32bit": (optimizer.emit_32bit, optimizer.ARGUMENTS_32BIT),
}
"""Kernel -> what writes it, names of its arguments in order."""


@dataclass(frozen=True)
class Kernel:
    """A compiled variant."""

    address: int
    function: Callable[[int], None]

    def __call__(self, pieces: int, *arguments: int) -> None:
        """Run over ``pieces`` pieces of work; ``arguments`` in the order that :data:`KERNELS` gives."""
        threads.run(self.address, self.function, pieces, arguments)


def write(name: str, level: Level, variant: dict[str, Any]) -> tuple[str, str]:
    """Symbol and IR text of a kernel's variant."""
    emit, arguments = KERNELS[name]
    symbol = _symbol(name, level, variant)
    emitter = Emitter(symbol, arguments, typed_pointers=compiler.TYPED_POINTERS)
    emit(emitter, level, **variant)
    return symbol, emitter.finish()


def _symbol(name: str, level: Level, variant: dict[str, Any]) -> str:
    chosen = "".join(f"_{key}_{int(value) if isinstance(value, bool) else value}" for key, value in variant.items())
    return f"halfbyte_{name}_{level.name}{chosen}"


@functools.cache
def _kernel(name: str, level: Level, variant: tuple[tuple[str, Any], ...]) -> Kernel:
    chosen = dict(variant)
    return Kernel(*compiler.function(_symbol(name, level, chosen), level, lambda: write(name, level, chosen)[1]))


def kernel(name: str, **variant: Any) -> Kernel:
    """The variant for this machine's level, compiled if it is not yet."""
    return _kernel(name, host.level(), tuple(variant.items()))
