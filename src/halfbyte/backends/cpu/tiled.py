"""Products of bf16 activations on the matrix unit, for all but the fewest of them; see ``kernels/tiles.py``."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from halfbyte.backends.cpu import host, threads
from halfbyte.backends.cpu.call import Kernel, Product, Variant, kernel
from halfbyte.backends.cpu.kernels import tiles
from halfbyte.backends.cpu.kernels.level import CHUNK
from halfbyte.backends.cpu.weight import Sizes
from halfbyte.backends.cpu.workspace import scratch

__all__ = ["WIDE", "by_tiles", "takes", "variants"]

LEAST = 4
"""Activations from which tiles are faster than vectors."""

HIGH, WIDE = 2, 1
"""Tiles of rows and of activations multiplied at a time. Two by two would load less a product, and was slower on
Sapphire Rapids: there a load from the first-level cache takes the unit as long as a product."""

PANEL, PANEL_MANY = 3, 4
"""Chunks of a row decoded at a time for one group of activations, and for several, whose sums are stored and loaded
between panels."""

GROUP_ROWS, CACHED_BYTES = 128, 1 << 20
"""Rows of the weight whose sums a thread holds for several groups of activations, at most; as few as are multiplied at
a time if that many bytes hold the activations, which then come from the second-level cache again and again."""


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

    @property
    def prepared_tiles(self) -> int:
        """Tiles of activations that are put into order before, for all threads."""
        return self.groups * self.wide if self.groups > 1 else 0


def _plan(batch: int, rows: int, chunks: int, count: int) -> _Plan:
    wide = min(WIDE, -(-batch // tiles.SIDE))
    groups = -(-batch // (wide * tiles.SIDE))
    step = HIGH * tiles.SIDE
    if groups == 1:
        panel, held = PANEL, HIGH
        share = max(1, rows // (step * 8 * count)) * step  # at least eight pieces a thread where there are rows
    else:
        panel = PANEL_MANY
        most = step if tiles.ordered_bytes(groups * wide, chunks) <= CACHED_BYTES else GROUP_ROWS
        share = min(range(step, most + 1, step), key=lambda share: (_busiest(rows, share, count), -share))
        held = share // tiles.SIDE
    return _Plan(wide, groups, panel, share, tiles.workspace_bytes(wide, groups, panel, held, chunks))


def _busiest(rows: int, share: int, count: int) -> int:
    """Rows of the thread with the most pieces of ``share`` rows."""
    return -(-rows // (share * count)) * share


def variants(nested: bool, halves: bool, wide: int, whole: bool) -> list[Variant]:
    """The kernels for ``wide`` tiles of activations at a time; ``whole`` if there are no more."""
    product = ("product_tiles", {"nested": nested, "halves": halves, "high": HIGH, "wide": wide, "whole": whole})
    return [product] if whole else [product, ("prepare_tiles", {})]


def by_tiles(batch: int, weight: Sizes) -> Product:
    """From a few activations to any number of them."""

    @functools.cache
    def way(count: int) -> Product:
        plan = _plan(batch, weight.rows, weight.chunks, count)
        found = variants(weight.nested, weight.blocksize < CHUNK, plan.wide, plan.groups == 1)
        return _way(plan, batch, weight, count, *(kernel(name, **variant) for name, variant in found))

    def multiply(source: int, stride: int, out: int, packed: int, inputs: tuple[int, ...]) -> None:
        # Each thread has memory of its own, so their number must be that of this call.
        way(threads.count())(source, stride, out, packed, inputs)

    return multiply


def _way(plan: _Plan, batch: int, weight: Sizes, count: int, product: Kernel, prepare: Kernel | None = None) -> Product:
    """The product by ``count`` threads."""
    chunks, size = weight.chunks, tiles.ordered_bytes(plan.prepared_tiles, weight.chunks)
    total, pieces = size + count * plan.workspace_bytes, -(-weight.rows // plan.rows_a_piece)
    shift = max(0, weight.blocksize.bit_length() - CHUNK.bit_length())
    numbers = (shift, weight.rows, chunks, batch, plan.groups, plan.panel, plan.rows_a_piece)
    ahead = plan.panel * CHUNK // 2
    a_piece = -(-chunks // max(1, 2 * count // max(1, plan.prepared_tiles)))
    a_tile = -(-chunks // a_piece)

    def multiply(source: int, stride: int, out: int, packed: int, inputs: tuple[int, ...]) -> None:
        x = scratch(total)
        if prepare is not None:
            prepare(plan.prepared_tiles * a_tile, source, x, stride, chunks, batch, a_piece, a_tile)
            source = x
        product(pieces, packed, source, stride, out, *inputs, *numbers, x + size, plan.workspace_bytes, ahead, 0)

    return multiply
