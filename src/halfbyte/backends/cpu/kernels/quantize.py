"""Values to packed 4-bit codes: absmax of a block, then the rank among midpoints by a search tree in registers."""

from __future__ import annotations

from halfbyte.backends.cpu.kernels.emitter import F32, Emitter, Type, Value
from halfbyte.backends.cpu.kernels.levels import Level
from halfbyte.backends.cpu.kernels.values import ITEMSIZE, load_float

__all__ = ["ARGUMENTS", "TREE_BYTES", "Blocks", "emit"]

ARGUMENTS = ("source", "packed", "absmax", "tables", "blocks", "blocksize", "blocks_a_piece")
"""``tables``: the midpoints as a search tree of 16 fp32, then the code of each rank as 16 bytes."""

TREE_BYTES = 64
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


def emit(e: Emitter, level: Level, *, dtype: str, coding: str) -> None:
    """Write the kernel.

    Args:
        dtype: Of the source.
        coding: ``rank`` where codes rise with the value, ``map`` where they do not, ``sign`` for magnitude and sign.
    """
    source, packed, absmax, tables, blocks, blocksize, a_piece = (e.argument(name) for name in ARGUMENTS)
    tree, codes = level.tree(e, tables), e.load(Type("i8", 16), tables + TREE_BYTES)
    walk = Blocks(e, level, dtype)
    with e.pieces() as piece:
        start = piece * a_piece
        stop = e.select(e.compare("slt", start + a_piece, blocks), start + a_piece, blocks)
        with e.loop(start, stop) as block:
            address = source + block * blocksize * ITEMSIZE[dtype]
            scale = walk.absmax(address, blocksize)
            e.store(scale, absmax + (block << 2))
            factors = walk.factors(scale)
            to = packed + ((block * blocksize) >> 1)
            with e.loop(0, blocksize, UNIT) as unit:
                values = [value * factors[0] * factors[1] for value in walk.load_unit(address + unit * ITEMSIZE[dtype])]
                e.store(_pack(e, level, values, tree, codes, coding), to + (unit >> 1))


def _pack(e: Emitter, level: Level, values: list[Value], tree: object, codes: Value, coding: str) -> Value:
    """One byte for every two values."""
    ranks = [_rank(e, level, value, tree, coding == "sign") for value in values]
    narrow = e.convert("trunc", e.concat(ranks), "i8")
    if coding == "map":
        narrow = level.lookup_bytes(e, codes, narrow)
    elif coding == "sign":
        narrow = level.lookup_bytes(e, codes, narrow & 15) | ((narrow >> 4) & 8)
    pairs = e.bits(narrow, Type("i16", UNIT // 2))
    return e.convert("trunc", ((pairs << 4) | (pairs >> 8)) & 0xFF, "i8")


def _rank(e: Emitter, level: Level, value: Value, tree: object, by_magnitude: bool) -> Value:
    """Number of midpoints strictly below, as i32; with bit 7 for negative values where signs count. NaN has rank 0."""
    word = value.type.of("i32")
    sought = value
    if by_magnitude:
        # Ties take the lower value: one ulp more for negative values makes "strictly below" an "at most".
        bits = e.bits(value, word)
        sought = e.bits((bits & 0x7FFFFFFF) + ((bits >> 31) & 1), value.type)
    index = e.const(word, 1)
    for depth in range(4):
        above = e.convert("sext", e.compare("ogt", sought, level.node(e, tree, index, depth)), "i32")
        index = index + index - above
    rank = index & 15
    if by_magnitude:
        rank = rank | (e.convert("sext", e.compare("olt", value, 0.0), "i32") & 0x80)
    return rank
