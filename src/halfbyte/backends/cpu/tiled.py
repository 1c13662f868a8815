"""Products of bf16 activations on the matrix unit, for all but the fewest of them; see ``kernels/tiles.py``."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from halfbyte.backends.cpu import host, threads
from halfbyte.backends.cpu.call import Kernel, Product, Variant, kernel
from halfbyte.backends.cpu.kernels import tiles
from halfbyte.backends.cpu.kernels.level import CHUNK, Level
from halfbyte.backends.cpu.weight import Sizes
from halfbyte.backends.cpu.workspace import scratch

__all__ = ["WIDE", "by_tiles", "takes", "variants"]

LEAST = 4
"""Activations from which tiles are faster than vectors."""

HIGH, WIDE = 2, 1
"""Tiles of rows and of activations multiplied at a time. Two by two would load less a product, and was slower on
Sapphire Rapids: there a load from the first-level cache takes the unit as long as a product."""

UNROLL = 4
"""Rows decoded side by side."""

PANEL, PANEL_MANY = 2, 4
"""Chunks of a row decoded at a time for one group of activations (a cache line of each row), and for several, whose
sums are stored and loaded between panels."""

ALONE = 64
"""Chunks that one thread puts into order sooner than several are called for it."""

GROUP_ROWS = 128
"""Rows of the weight whose sums a thread holds for several groups of activations, at most."""


def takes(batch: int, dtype: torch.dtype) -> bool:
    """Whether the matrix unit is the fastest for such activations."""
    return dtype == torch.bfloat16 and batch >= LEAST and host.level().matrix


@dataclass(frozen=True)
class _Plan:
    """How a product is cut: tiles side by side, groups of them, chunks a panel, rows a piece of work."""

    wide: int
    groups: int
    panel: int
    rows_a_piece: int
    workspace_bytes: int


@functools.lru_cache(maxsize=256)
def _plan(batch: int, rows: int, chunks: int, count: int) -> _Plan:
    wide = min(WIDE, -(-batch // tiles.SIDE))
    groups = -(-batch // (wide * tiles.SIDE))
    step = HIGH * tiles.SIDE
    if groups == 1:
        panel, held = min(PANEL, chunks), HIGH
        blocks = max(min(2, rows // (step * count)), rows // (step * 8 * count), 1)  # eight pieces a thread, or fewer
        share = blocks * step
    else:
        panel = min(PANEL_MANY, chunks)
        share = min(range(step, GROUP_ROWS + 1, step), key=lambda share: (_busiest(rows, share, count), -share))
        held = share // tiles.SIDE
    return _Plan(wide, groups, panel, share, tiles.workspace_bytes(wide, groups, panel, held))


def _busiest(rows: int, share: int, count: int) -> int:
    """Rows of the thread with the most pieces of ``share`` rows."""
    return -(-rows // (share * count)) * share


@functools.cache
def _kernels(level: Level, nested: bool, halves: bool, wide: int, whole: bool) -> tuple[Kernel, Kernel]:
    del level  # what the kernels are kept by
    prepare, product = (kernel(name, **variant) for name, variant in variants(nested, halves, wide, whole))
    return prepare, product


def variants(nested: bool, halves: bool, wide: int, whole: bool) -> list[Variant]:
    """The two kernels for ``wide`` tiles of activations at a time; ``whole`` if there are no more."""
    shape = {"high": HIGH, "wide": wide, "whole": whole, "unroll": UNROLL}
    return [("prepare_tiles", {}), ("product_tiles", {"nested": nested, "halves": halves, **shape})]


def by_tiles(batch: int, weight: Sizes) -> Product:
    """From a few activations to any number of them."""
    rows, columns, chunks = weight.rows, weight.columns, weight.chunks
    nested, halves = weight.nested, weight.blocksize < CHUNK
    shift = max(0, weight.blocksize.bit_length() - CHUNK.bit_length())

    def multiply(source: int, stride: int, out: int, packed: int, inputs: tuple[int, ...]) -> None:
        count = threads.count()  # each has memory of its own, so the number must be that of this call
        plan = _plan(batch, rows, chunks, count)
        across = plan.groups * plan.wide
        prepare, product = _kernels(host.level(), nested, halves, plan.wide, plan.groups == 1)
        size = across * tiles.SIDE * columns * 2
        x = scratch(size + tiles.COUNTER_BYTES + count * plan.workspace_bytes)
        a_piece = chunks if across * chunks <= ALONE else -(-chunks // max(1, 2 * count // across))
        a_tile = -(-chunks // a_piece)
        prepare(across * a_tile, source, x, stride, chunks, batch, a_piece, a_tile)
        address = x + size
        ctypes.c_int64.from_address(address).value = 0
        product(
            -(-rows // plan.rows_a_piece),
            packed,
            x,
            out,
            *inputs,
            shift,
            rows,
            chunks,
            batch,
            plan.groups,
            plan.panel,
            plan.rows_a_piece,
            address,
            plan.workspace_bytes,
            plan.panel * CHUNK // 2,
        )

    return multiply
