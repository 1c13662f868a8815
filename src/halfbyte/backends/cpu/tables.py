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


@functools.lru_cache(maxsize=64)
def lookup_of(quant_type: str) -> Table:
    """Lookup block of a registered 4-bit codebook."""
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
    """Buckets of an 8-bit map and how a value finds its own; see ``kernels/blockwise.py``."""

    table: Table
    low: int
    count: int


_ONE = 0x3F80  # upper half of 1.0; scaled values are at most 1 in magnitude, give or take a rounding
_NEVER = 0xFFFF0000


@functools.lru_cache(maxsize=64)
def buckets(code: bytes) -> Buckets | str:
    """Buckets for a rising map of 256 fp32, given as its bytes; a reason if its values are too close together.

    A bucket is a range of magnitudes that share sign, exponent and seven bits of the mantissa. It may hold one
    midpoint: then one comparison of the other 16 bits finds the rank.
    """
    values = np.frombuffer(code, np.float32)
    if not np.isfinite(values).all() or (np.diff(values) < 0).any():
        return "the code map does not rise from value to value"
    midpoints = ((values[:-1] + values[1:]) * np.float32(0.5)).astype(np.float32)
    magnitudes = np.abs(midpoints[midpoints != 0]).view(np.uint32)
    # The bucket below the smallest midpoint is the first: all smaller magnitudes have its code.
    low = max(0, int(magnitudes.min() >> 16) - 1) if magnitudes.size else _ONE - 1
    count = _ONE + 1 - low
    if count > 1 << 13 or count < 1:
        return "the code map has values too far from 1"
    first = np.arange(low, low + count, dtype=np.uint32) << np.uint32(16)
    last = (first | np.uint32(0xFFFF)).view(np.float32)
    first[0] = 1  # zero has a bucket of its own
    first = first.view(np.float32)
    positive, negative = _entries(midpoints, first, last), _entries(midpoints, -last, -first)
    if positive is None or negative is None:
        return "the code map has values too close together for one comparison each"
    zero = np.searchsorted(midpoints, np.float32(0.0), side="left")
    entries = np.concatenate([positive, negative, np.array([_NEVER | int(zero), _NEVER], np.uint32)])
    return Buckets(Table.of(entries.view(np.uint8)), low, count)


def _entries(midpoints: FloatArray, lowest: FloatArray, highest: FloatArray) -> npt.NDArray[np.uint32] | None:
    """One u32 a bucket, given by its lowest and highest value: the rank, one more above the midpoint in it."""
    below = np.searchsorted(midpoints, lowest, side="left")
    above = np.searchsorted(midpoints, highest, side="left")
    if (above > below + 1).any():
        return None
    bits = midpoints[np.minimum(below, midpoints.size - 1)].view(np.uint32)
    bits = np.where(bits >> 31, ~bits, bits) << np.uint32(16)
    return (np.where(above > below, bits, np.uint32(_NEVER)) | below).astype(np.uint32)
