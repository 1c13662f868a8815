"""Values to packed 4-bit codes: absmax of a block, then the rank among midpoints by tables in registers."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.level import Level
from halfbyte.backends.cpu.kernels.ssa import F32, Type, Value
from halfbyte.backends.cpu.kernels.values import ITEMSIZE, load_float

__all__ = ["ARGUMENTS", "Blocks", "emit"]

ARGUMENTS = ("source", "packed", "absmax", "tables", "blocks", "blocksize", "blocks_a_piece")
"""``tables``: see the constants below."""

TREE, CODES, FACTOR, MIDPOINTS, RANKS, TABLE_BYTES = 0, 64, 80, 84, 212, 340
"""Where the table holds the midpoints as a search tree of 16 fp32, the code of each rank as 16 bytes, and for levels
with wide lookups the factor that takes a value to its bucket, the midpoint in each of 32 buckets and the rank below."""

ROUND_MAGNITUDE, ROUND_SIGNED = 1.5 * 2.0**23, 1.5 * 2.0**23 + 16
"""Added to a small fp32, they leave the nearest integer, or that plus 16, in the low bits: the bucket. Values from -1
to 1 take buckets 1 to 31, so that bucket 0, where a NaN without payload falls, has rank 0 in either case."""
UNIT = 32
"""Values encoded at a time; every block has a whole number of units."""

TINY, BOOST = 2.0**-100, 2.0**100
"""Below this absmax the reciprocal would overflow: the block is scaled up first, by an exact power of two."""


class Blocks:
    """Walks blocks of floats in registers: absmax first, then scaled values unit by unit."""

    def __init__(self, e: Emitter, level: Level, dtype: str) -> None:
        self.e, self.level, self.dtype = e, level, dtype
        self.per_unit = UNIT // level.lanes

    def load_unit(self, address: Value) -> list[Value]:
        step = self.level.lanes * ITEMSIZE[self.dtype]
        return [
            load_float(self.e, self.level, address + i * step, self.dtype, self.level.lanes)
            for i in range(self.per_unit)
        ]

    def absmax(self, address: Value, blocksize: Value) -> Value:
        """Largest magnitude of a block; NaN if there is one, as its bits are above those of infinity."""
        e, word = self.e, Type("i32", self.level.lanes)
        largest = e.variable(word, 0)
        with e.loop(0, blocksize, UNIT) as start:
            for value in self.load_unit(address + start * ITEMSIZE[self.dtype]):
                largest.set(e.maximum(largest.get(), e.bits(value, word) & 0x7FFFFFFF))
        return e.bits(e.largest(largest.get()), F32)

    def factors(self, absmax: Value) -> tuple[Value, Value]:
        """What scaled values are multiplied with, one after the other: boost and reciprocal, in every lane."""
        e = self.e
        boost = e.select(e.compare("olt", absmax, TINY), e.const(F32, BOOST), 1.0)
        reciprocal = e.const(F32, 1.0) / (absmax * boost)
        reciprocal = e.select(e.compare("oeq", absmax, 0.0), e.const(F32, 0.0), reciprocal)
        return e.splat(boost, self.level.lanes), e.splat(reciprocal, self.level.lanes)

    def scalings(self, absmax: Value, factors: tuple[Value, Value]) -> list[tuple[Value, Sequence[Value]]]:
        """When to use which factors: the boost only for tiny and NaN blocks."""
        e = self.e
        return [(e.compare("oge", absmax, TINY), factors[1:]), (e.compare("ult", absmax, TINY), factors)]

    def scaled(self, value: Value, factors: Sequence[Value]) -> Value:
        """The value times each factor in turn."""
        for factor in factors:
            value = value * factor
        return value


def emit(e: Emitter, level: Level, *, dtype: str, coding: str, buckets: bool) -> None:
    """Write the kernel.

    Args:
        dtype: Of the source.
        coding: ``rank`` where codes rise with the value, ``map`` where they do not, ``sign`` for magnitude and sign.
        buckets: Ranks by buckets instead of the tree: a third of the work, on levels with wide lookups.
    """
    source, packed, absmax, tables, blocks, blocksize, a_piece = (e.argument(name) for name in ARGUMENTS)
    ranks = _Ranks(e, level, tables, coding, buckets)
    walk = Blocks(e, level, dtype)
    with e.pieces() as piece:
        start = piece * a_piece
        stop = e.least(start + a_piece, blocks)
        with e.loop(start, stop) as block:
            address = source + block * blocksize * ITEMSIZE[dtype]
            scale = walk.absmax(address, blocksize)
            e.store(scale, absmax + (block << 2))
            factors = walk.factors(scale)
            to = packed + ((block * blocksize) >> 1)
            for condition, scaling in walk.scalings(scale, factors):
                with e.when(condition), e.loop(0, blocksize, UNIT) as unit:
                    values = walk.load_unit(address + unit * ITEMSIZE[dtype])
                    e.store(ranks.pack([ranks.rank(walk.scaled(v, scaling)) for v in values]), to + (unit >> 1))
            with e.when(e.compare("uno", scale, scale)), e.loop(0, blocksize, UNIT) as unit:
                zeros = [e.const(Type("i32", level.lanes), 0)] * walk.per_unit
                e.store(ranks.pack(zeros), to + (unit >> 1))


class _Ranks:
    """Number of midpoints strictly below a value, and the packed codes of ranks."""

    def __init__(self, e: Emitter, level: Level, tables: Value, coding: str, buckets: bool) -> None:
        self.e, self.level, self.coding, self.buckets = e, level, coding, buckets
        self.codes = e.load(Type("i8", 16), tables + CODES)
        if buckets:
            self.factor = e.splat(e.load(F32, tables + FACTOR), level.lanes)
            self.midpoints = level.wide_table(e, tables + MIDPOINTS, "float")
            self.below = level.wide_table(e, tables + RANKS, "i32")
        else:
            self.tree = level.tree(e, tables + TREE)
            self.top = [e.splat(e.load(F32, tables + (TREE + 4 * node)), level.lanes) for node in (1, 2, 3)]

    def rank(self, value: Value) -> Value:
        """In the low four bits of an i32, with bit 7 for negative values where signs count. NaN without payload: 0."""
        e, word = self.e, value.type.of("i32")
        if self.coding != "sign":
            return self._by_bucket(value, value) if self.buckets else self._by_tree(value)
        # Ties take the lower value: one ulp more for negative values makes "strictly below" an "at most".
        bits = e.bits(value, word)
        magnitude = bits & 0x7FFFFFFF
        sought = e.bits(magnitude + (bits >> 31), value.type)
        rank = self._by_bucket(e.bits(magnitude, value.type), sought) if self.buckets else self._by_tree(sought)
        return rank | (e.convert("sext", e.compare("olt", value, 0.0), "i32") & 0x80)

    def _by_bucket(self, place: Value, value: Value) -> Value:
        e, word = self.e, value.type.of("i32")
        index = e.bits(place * self.factor + (ROUND_MAGNITUDE if self.coding == "sign" else ROUND_SIGNED), word)
        midpoint = self.level.lookup_wide(e, self.midpoints, index, "float")
        below = self.level.lookup_wide(e, self.below, index, "i32")
        return below - e.convert("sext", e.compare("ogt", value, midpoint), "i32")

    def _by_tree(self, value: Value) -> Value:
        """16 plus the rank, by four comparisons; the first two nodes need no lookup."""
        e, word = self.e, value.type.of("i32")
        above = e.compare("ogt", value, self.top[0])
        index = e.select(above, e.const(word, 3), 2)
        node = e.select(above, self.top[2], self.top[1])
        for depth in (2, 3, 4):
            index = index + index - e.convert("sext", e.compare("ogt", value, node), "i32")
            if depth < 4:
                node = self.level.node(e, self.tree, index, depth)
        return index

    def pack(self, ranks: list[Value]) -> Value:
        """One byte for every two values."""
        e = self.e
        narrow = self.level.narrow(e, ranks)
        if not self.buckets:
            narrow = narrow & (0x8F if self.coding == "sign" else 15)
        if self.coding == "map":
            narrow = self.level.lookup_bytes(e, self.codes, narrow)
        elif self.coding == "sign":
            narrow = self.level.lookup_bytes(e, self.codes, narrow & 15) | ((narrow >> 4) & 8)
        pairs = e.bits(narrow, Type("i16", UNIT // 2))
        return e.convert("trunc", ((pairs << 4) | (pairs >> 8)) & 0xFF, "i8")
