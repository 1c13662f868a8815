"""What kernels read beside the data, as bytes in memory: lookup blocks, search trees, buckets of 8-bit maps."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from halfbyte.backends.cpu.kernels.levels import (
    TABLE_BYTES,
    TABLE_COARSE,
    TABLE_COARSE_PLANES,
    TABLE_EXACT,
    TABLE_EXACT_PLANES,
)
from halfbyte.formats.codebook import Codebook, codebook

__all__ = ["Buckets", "Table", "buckets", "lookup", "lookup_of", "search"]

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Table:
    """Bytes that stay where they are."""

    array: npt.NDArray[np.uint8]
    address: int

    @staticmethod
    def of(array: npt.NDArray[np.uint8]) -> Table:
        return Table(array, int(array.ctypes.data))


@functools.lru_cache(maxsize=64)
def lookup(levels: bytes) -> Table:
    """Lookup block of 16 fp32 levels, given as their bytes: exact and rounded to bf16, whole and as byte planes."""
    exact = np.frombuffer(levels, np.float32)
    bits = exact.view(np.uint32)
    coarse = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    block = np.zeros(TABLE_BYTES, np.uint8)
    block[TABLE_EXACT : TABLE_EXACT + 64] = exact.view(np.uint8)
    block[TABLE_EXACT_PLANES : TABLE_EXACT_PLANES + 64] = bits.view(np.uint8).reshape(16, 4).T.reshape(-1)
    block[TABLE_COARSE : TABLE_COARSE + 32] = coarse.view(np.uint8)
    block[TABLE_COARSE_PLANES : TABLE_COARSE_PLANES + 32] = coarse.view(np.uint8).reshape(16, 2).T.reshape(-1)
    return Table.of(block)


@functools.lru_cache(maxsize=64)
def lookup_of(quant_type: str) -> Table:
    """Lookup block of a registered 4-bit codebook."""
    return lookup(codebook(quant_type).table.tobytes())


@functools.lru_cache(maxsize=64)
def search(quant_type: str) -> tuple[Table, str]:
    """Search tree and code of each rank for a registered 4-bit codebook, and how its codes come from ranks.

    Node ``i`` of the tree has the children ``2 i`` and ``2 i + 1``; a value above the node's midpoint goes to the
    second. After four steps from node 1 the place below the tree is 16 plus the rank.
    """
    book = codebook(quant_type)
    midpoints = np.full(15, np.inf, np.float32)
    midpoints[: book.midpoints.size] = book.midpoints
    tree = np.zeros(16, np.float32)
    for node in range(1, 16):
        depth = node.bit_length() - 1
        tree[node] = midpoints[((2 * (node - (1 << depth)) + 1) << (3 - depth)) - 1]
    codes = np.zeros(16, np.uint8)
    codes[: len(book.rank_to_code)] = book.rank_to_code
    return Table.of(np.concatenate([tree.view(np.uint8), codes])), _coding(book)


def _coding(book: Codebook) -> str:
    if book.sign_bit is not None:
        return "sign"
    return "rank" if book.rank_to_code == tuple(range(16)) else "map"


@dataclass(frozen=True)
class Buckets:
    """Buckets of an 8-bit map and how a value finds its own; see ``kernels/blockwise.py``."""

    table: Table
    shift: int
    low: int
    count: int


_MAGNITUDE = 0x7FFFFFFF
_ONE = 0x3F800000


@functools.lru_cache(maxsize=64)
def buckets(code: bytes) -> Buckets | str:
    """Buckets for a rising map of 256 fp32, given as its bytes; a reason if its values are too close together.

    A bucket is a range of magnitudes that share sign, exponent and first mantissa bits. It may hold one midpoint (any
    number of times): then one comparison finds the rank.
    """
    values = np.frombuffer(code, np.float32)
    if not np.isfinite(values).all() or (np.diff(values) < 0).any():
        return "the code map does not rise from value to value"
    midpoints = ((values[:-1] + values[1:]) * np.float32(0.5)).astype(np.float32)
    for mantissa_bits in range(4, 9):
        found = _buckets(midpoints, 23 - mantissa_bits)
        if found is not None:
            return found
    return "the code map has values too close together for one comparison each"


def _buckets(midpoints: FloatArray, shift: int) -> Buckets | None:
    magnitudes = np.abs(midpoints[midpoints != 0]).view(np.uint32)
    smallest = int(magnitudes.min()) if magnitudes.size else _ONE
    low = max(0, (smallest >> shift) - 1)
    # Scaled values are at most 1 in magnitude, give or take a rounding.
    count = (_ONE >> shift) + 1 - low
    if count > 1 << 13 or count < 1:
        return None
    first = (np.arange(low, low + count, dtype=np.uint32) << np.uint32(shift)).astype(np.uint32)
    last = (((np.arange(low, low + count, dtype=np.uint64) + 1) << np.uint64(shift)) - 1).astype(np.uint32)
    first[0] = 0
    first, last = first.view(np.float32), last.view(np.float32)
    lowest, highest = np.concatenate([first, -last]), np.concatenate([last, -first])
    below = np.searchsorted(midpoints, lowest, side="left")
    above = np.searchsorted(midpoints, highest, side="left")
    middle = np.where(above > below, midpoints[np.minimum(below, midpoints.size - 1)], np.float32(np.inf))
    if (np.searchsorted(midpoints, middle, side="right") < above).any():
        return None
    entries = np.zeros(2 * count + 1, np.dtype([("midpoint", "<f4"), ("below", "u1"), ("above", "u1"), ("pad", "<u2")]))
    entries["midpoint"][:-1], entries["below"][:-1], entries["above"][:-1] = middle, below, above
    entries["midpoint"][-1] = np.inf
    return Buckets(Table.of(entries.view(np.uint8)), shift, low, count)
