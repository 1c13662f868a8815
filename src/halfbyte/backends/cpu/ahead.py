"""Compiles ahead what a model's first forward and backward need, so that they find it on disk."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import torch

from halfbyte.backends.cpu import compiler, fused, host, threads, tiled
from halfbyte.backends.cpu.call import DTYPES, Variant, kernel
from halfbyte.backends.cpu.kernels.level import CHUNK
from halfbyte.formats import DEFAULT_BLOCKSIZE_4BIT

__all__ = ["plan", "warmup"]


def plan(dtypes: Sequence[torch.dtype], blocksizes: Sequence[int], nested: Sequence[bool]) -> list[Variant]:
    """Kernels and variants of a 4-bit model: loading (quantize), decoding, prompts and the backward pass."""
    found: list[Variant] = []
    halves = sorted({blocksize < CHUNK for blocksize in blocksizes})
    for dtype in (DTYPES[one] for one in dtypes):
        found.append(("quantize_4bit", {"dtype": dtype, "coding": "rank", "buckets": host.level().wide_lookup}))
        for double, half in itertools.product(nested, halves):
            found += [
                ("dequantize_4bit", {"dtype": dtype, "nested": double, "halves": half, "exact": exact})
                for exact in (True, False)
            ]
            found += [
                ("product_4bit", {"dtype": dtype, "nested": double, "halves": half, "tile": tile})
                for tile in fused.tiles_in_use()
            ]
        found += [("prepare", {"dtype": dtype, "tile": tile}) for tile in fused.tiles_in_use()]
        found += _wide(dtype, blocksizes, nested)
    if any(nested):
        found += [
            ("quantize_blockwise", {"dtype": "f32", "repeats": False}),
            ("dequantize_blockwise", {"dtype": "f32"}),
        ]
    if torch.float32 not in dtypes:  # slices are multiplied in fp32 where the CPU has no product of the dtype
        found += [
            ("dequantize_4bit", {"dtype": "f32", "nested": double, "halves": half, "exact": False})
            for double, half in itertools.product(nested, halves)
        ]
    return [one for i, one in enumerate(found) if one not in found[:i]]


def _wide(dtype: str, blocksizes: Sequence[int], nested: Sequence[bool]) -> list[Variant]:
    """Kernels that only some levels have: rows of 128 codes for a few activations, the matrix unit for more."""
    level, found = host.level(), list[Variant]()
    for double, blocksize in itertools.product(nested, blocksizes):
        if level.wide_rows:
            for batch in range(1, fused.ROWS_BATCH + 1):
                found.append(fused.row_variant(level, dtype, double, fused.blocks_of(blocksize), batch))
        if level.matrix and dtype == "bf16":
            for wide, whole in {(1, True), (tiled.WIDE, True), (tiled.WIDE, False)}:
                found += tiled.variants(double, blocksize < CHUNK, wide, whole)
    return found


def warmup(
    say: Callable[[str], None],
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, int]] = (),
    experts: Sequence[tuple[int, int, int, int, bool]] = (),
) -> None:
    """Compile for this machine what 4-bit models of default blocksize need, and report through ``say``.

    Args:
        say: Takes one line of text.
        dtypes: Of activations.
        shapes: Not needed: these kernels serve every shape.
        experts: Not needed: each of them is a weight as any other.
    """
    del shapes, experts
    start = time.perf_counter()
    wanted = plan(dtypes, (DEFAULT_BLOCKSIZE_4BIT,), (False, True))
    for name, variant in wanted:
        kernel(name, **variant)
    say(
        f"cpu: {len(wanted)} kernels for {host.level().name}, {threads.count()} threads ({threads.source()}), "
        f"{time.perf_counter() - start:.1f} s, kept in {compiler.cache_directory()}"
    )
