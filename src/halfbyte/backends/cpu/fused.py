"""Products with few activations in one pass over the packed weight, on vector registers."""

from __future__ import annotations

import ctypes
import functools

import torch

from halfbyte.backends.cpu import host, threads
from halfbyte.backends.cpu.call import DTYPES, Kernel, Product, Variant, kernel
from halfbyte.backends.cpu.kernels import rows
from halfbyte.backends.cpu.kernels.level import CHUNK, Level
from halfbyte.backends.cpu.kernels.product import ROWS
from halfbyte.backends.cpu.weight import Sizes
from halfbyte.backends.cpu.workspace import scratch

__all__ = ["ROWS_BATCH", "blocks_of", "by_chunks", "by_rows", "row_variant", "takes_rows", "tiles_in_use"]

PANEL_BYTES = 16 << 10
"""Activations that a tile works on at a time: half of the smallest first-level cache."""

ROWS_BATCH = 3
"""Up to this many activations, 128 codes are taken at a time where the level can."""

TOGETHER = 4
"""Rows that are worked on at once then: enough loads in flight, and no more than registers hold."""


def takes_rows(batch: int, columns: int) -> bool:
    """Whether :func:`by_rows` serves."""
    return batch <= ROWS_BATCH and columns % rows.WIDE == 0 and host.level().wide_rows


def blocks_of(blocksize: int) -> int:
    """Blocks that 128 codes belong to."""
    return max(1, rows.WIDE // blocksize)


def by_rows(batch: int, dtype: torch.dtype, weight: Sizes) -> Product:
    """Very few activations: several rows at a time, 128 codes in one register."""
    columns, blocks = weight.columns, blocks_of(weight.blocksize)
    product, pairs = _row_kernel(host.level(), DTYPES[dtype], weight.nested, blocks, batch)
    size, groups = batch * columns * (2 if pairs else 4), columns // rows.WIDE
    a_piece = -(-weight.rows // (TOGETHER * 8 * threads.count())) * TOGETHER
    pieces = -(-weight.rows // a_piece)
    shift = max(0, weight.blocksize.bit_length() - rows.WIDE.bit_length())
    numbers = (shift, weight.rows, groups, batch, a_piece, columns // 2 * TOGETHER, size, 0)

    def multiply(source: int, stride: int, out: int, packed: int, inputs: tuple[int, ...]) -> None:
        ordered = scratch(threads.count() * size)
        product(pieces, packed, source, stride, ordered, out, *inputs, *numbers)

    return multiply


@functools.cache
def _row_kernel(level: Level, dtype: str, nested: bool, blocks: int, tile: int) -> tuple[Kernel, bool]:
    """The kernel, and whether it takes activations in pairs."""
    name, variant = row_variant(level, dtype, nested, blocks, tile)
    return kernel(name, **variant), variant["pairs"]


def row_variant(level: Level, dtype: str, nested: bool, blocks: int, tile: int) -> Variant:
    """The kernel of :func:`by_rows` for ``tile`` activations of ``dtype``; ``blocks`` share 128 codes."""
    shape = {"nested": nested, "blocks": blocks, "pairs": level.kind(dtype) == "dot"}
    return "product_rows", {"dtype": dtype, **shape, "together": TOGETHER, "tile": tile}


def by_chunks(batch: int, dtype: torch.dtype, weight: Sizes) -> Product:
    """Few activations, on every level: rows in groups that share a panel of activations."""
    tile, chunks = _tile(batch), weight.chunks
    count, halves = -(-batch // tile), weight.blocksize < CHUNK
    prepare, product, size = _chunk_kernels(host.level(), DTYPES[dtype], weight.nested, halves, tile)
    tile_bytes = tile * weight.columns * size
    a_piece = -(-weight.rows // (ROWS * 8 * threads.count())) * ROWS
    pieces = -(-weight.rows // a_piece)
    shift, panel = max(0, weight.blocksize.bit_length() - CHUNK.bit_length()), PANEL_BYTES // (tile * CHUNK * size)
    numbers = (shift, weight.rows, chunks, batch, count, max(1, panel), a_piece)

    def multiply(source: int, stride: int, out: int, packed: int, inputs: tuple[int, ...]) -> None:
        x = scratch(count * tile_bytes)
        if batch % tile:  # what is left of the last tile
            ctypes.memset(x + (count - 1) * tile_bytes, 0, tile_bytes)
        prepare(batch, source, x, stride, chunks)
        product(pieces, packed, x, out, *inputs, *numbers)

    return multiply


@functools.cache
def _chunk_kernels(level: Level, dtype: str, nested: bool, halves: bool, tile: int) -> tuple[Kernel, Kernel, int]:
    """The two kernels, and bytes of an activation between them."""
    prepare = kernel("prepare", dtype=dtype, tile=tile)
    product = kernel("product_4bit", dtype=dtype, nested=nested, halves=halves, tile=tile)
    return prepare, product, 2 if level.kind(dtype) == "dot" else 4


def tiles_in_use() -> tuple[int, ...]:
    """Tiles that batches of any size come to on this machine's level."""
    return (1, 2, 4, 8) if host.level().lanes == 16 else (1, 2, 4)


def _tile(batch: int) -> int:
    """Activations to multiply with a chunk at a time: as many as registers hold, without much left over."""
    if batch <= 2:
        return batch
    return min(tiles_in_use()[2:], key=lambda tile: (-(-batch // tile) * tile, -tile))
