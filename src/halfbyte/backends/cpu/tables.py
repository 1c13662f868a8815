"""What kernels read beside the data, as bytes in memory: lookup blocks, search trees, buckets of 8-bit maps."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from halfbyte.backends.cpu.kernels.level import (
    TABLE_BYTES,
    TABLE_COARSE,
    TABLE_COARSE_PLANES,
    TABLE_EXACT,
    TABLE_EXACT_PLANES,
)
from halfbyte.backends.cpu.kernels.quantize import FACTOR, ROUND_MAGNITUDE, ROUND_SIGNED
from halfbyte.backends.cpu.kernels.quantize import TABLE_BYTES as SEARCH_BYTES
from halfbyte.formats.codebook import Codebook, codebook

__all__ = ["Buckets", "Search", "Table", "buckets", "lookup", "lookup_of", "search"]

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


@functools.cache
def lookup_of(quant_type: str) -> Table:
    """Lookup block of a registered 4-bit codebook; kept for good, as products that are repeated know its address."""
    return lookup(codebook(quant_type).table.tobytes())


@dataclass(frozen=True)
class Search:
    """Table of ``kernels/quantize.py`` for a codebook, how codes come from ranks, whether its buckets are usable."""

    table: Table
    coding: str
    buckets: bool


@functools.lru_cache(maxsize=64)
def search(quant_type: str) -> Search:
    """What finds the ranks and codes of a registered 4-bit codebook.

    Node ``i`` of the search tree has the children ``2 i`` and ``2 i + 1``; a value above the node's midpoint goes to
    the second. After four steps from node 1 the place below the tree is 16 plus the rank.

    Buckets are equal parts of the values' range with at most one midpoint each.
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
    parts = _parts(book.midpoints, signed=book.sign_bit is None)
    empty = np.zeros(SEARCH_BYTES - FACTOR, np.uint8)
    block = np.concatenate([tree.view(np.uint8), codes, empty if parts is None else parts])
    return Search(Table.of(block), _coding(book), parts is not None)


def _parts(midpoints: FloatArray, signed: bool) -> npt.NDArray[np.uint8] | None:
    """Factor, midpoint and rank below of the 32 buckets, as bytes; None where two midpoints share one.

    A value's bucket is the five low bits of ``value * factor + ROUND_...``, which rises with the value.
    """
    factor = np.float32(15.49 if signed else 31.49)
    offset = np.float32(ROUND_SIGNED if signed else ROUND_MAGNITUDE)
    place = (midpoints * factor + offset).view(np.int32) & 31
    if np.unique(place).size < place.size:
        return None
    middle = np.full(32, np.inf, np.float32)
    below = (place[None, :] < np.arange(32)[:, None]).sum(axis=1).astype(np.int32)
    middle[place] = midpoints
    return np.concatenate([np.array([factor], np.float32).view(np.uint8), middle.view(np.uint8), below.view(np.uint8)])


def _coding(book: Codebook) -> str:
    if book.sign_bit is not None:
        return "sign"
    return "rank" if book.rank_to_code == tuple(range(16)) else "map"


@dataclass(frozen=True)
class Buckets:
    """Buckets of an 8-bit map and how a value finds its own; see ``kernels/blockwise.py``.

    Attributes:
        table: One u32 for each bucket.
        center: Address of bucket 0.
        shift: Bits of a value that its bucket leaves open.
        repeats: The map repeats values, so that a code may be followed by one that is not the next.
    """

    table: Table
    center: int
    shift: int
    repeats: bool


_SHIFTS = (18, 17, 16)
_INFINITY = 0x7F800000


@functools.lru_cache(maxsize=16)
def buckets(code: bytes) -> Buckets | str:
    """Buckets for a rising map of 256 fp32, given as its bytes; a reason if its values are too close together.

    A float's bits, negative ones turned around, are an integer that rises with the value. Its upper bits count to a
    bucket, which may hold one midpoint: then one comparison of the other bits finds the rank. The fewer buckets, the
    less they take of the cache.
    """
    values = np.frombuffer(code, np.float32)
    if not np.isfinite(values).all() or (np.diff(values) < 0).any():
        return "the code map does not rise from value to value"
    midpoints = ((values[:-1] + values[1:]) * np.float32(0.5)).astype(np.float32) + np.float32(0)  # no -0
    bits = midpoints.view(np.int32)
    ordered = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int64)
    different, counts = np.unique(ordered, return_counts=True)
    repeats = bool((counts > 1).any())
    for shift in _SHIFTS[-1:] if repeats else _SHIFTS:
        found = _entries(different, counts, shift)
        if found is not None:
            return Buckets(Table.of(found.view(np.uint8)), int(found.ctypes.data) + found.nbytes // 2, shift, repeats)
    return "the code map has values too close together for one comparison each"


def _entries(
    midpoints: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], shift: int
) -> npt.NDArray[np.uint32] | None:
    """One u32 for each bucket of ``2**shift`` integers; None if one holds two different midpoints."""
    half = 1 << (31 - shift)
    first = np.arange(-half, half, dtype=np.int64) << shift
    place = np.searchsorted(midpoints, first)
    inside = np.searchsorted(midpoints, first + (1 << shift)) - place
    if (inside > 1).any():
        return None
    place = np.minimum(place, midpoints.size - 1)
    below = np.concatenate([[0], np.cumsum(counts)])[np.searchsorted(midpoints, first)]
    open_bits = ((midpoints[place] << (32 - shift)) & 0xFFFFFFFF) ^ 0x80000000  # to be compared as signed
    if (counts > 1).any():
        open_bits |= counts[place] << 8
    never = 0x80000000 - (1 << (32 - shift))
    found = np.where(inside > 0, open_bits, never) | below
    found[first >= _INFINITY] = never  # NaN has rank 0
    return found.astype(np.uint32)
