"""Packed 4-bit codes to values: levels times absmax, rounded once."""

from __future__ import annotations

from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.level import CHUNK, TABLE_EXACT, Level
from halfbyte.backends.cpu.kernels.ssa import F32, I8, Type, Value
from halfbyte.backends.cpu.kernels.values import ITEMSIZE, Scales, round_to, store_float

__all__ = ["ARGUMENTS", "emit"]

ARGUMENTS = (
    "packed",
    "out",
    "tables",
    *Scales.ARGUMENTS,
    "blocksize_log2",
    "first",
    "stride",
    "length",
    "end",
    "segments",
    "segments_a_piece",
)
"""Segment ``s`` is the elements from ``first + s * stride`` on, ``length`` of them or up to ``end``."""


def emit(e: Emitter, level: Level, *, dtype: str, nested: bool, halves: bool, exact: bool = True) -> None:
    """Write the kernel.

    Args:
        dtype: Of the output: f32, bf16, f16.
        nested: absmax is double-quantized.
        halves: Blocks have 32 values, so that a chunk is two blocks; else 64 or more.
        exact: Round to even. Otherwise, for bf16, halves go up, which saves a third of the work.
    """
    body = _Body(e, level, dtype, nested, halves, exact)
    first, stride, length, end, segments, a_piece = (e.argument(name) for name in ARGUMENTS[-6:])
    with e.pieces() as piece:
        start = piece * a_piece
        stop = e.least(start + a_piece, segments)
        with e.loop(start, stop) as segment:
            begin = first + segment * stride
            body.segment(begin, e.least(begin + length, end), body.out + segment * length * ITEMSIZE[dtype])


class _Body:
    def __init__(self, e: Emitter, level: Level, dtype: str, nested: bool, halves: bool, exact: bool) -> None:
        self.e, self.level, self.dtype, self.halves, self.exact = e, level, dtype, halves, exact
        self.packed, self.out, self.tables = e.argument("packed"), e.argument("out"), e.argument("tables")
        self.scales, self.shift = Scales(e, nested), e.argument("blocksize_log2")
        if dtype == "f32":
            self.table = level.table(e, self.tables, "exact")
        else:
            self.levels = e.load(Type("float", 16), self.tables + TABLE_EXACT)

    def segment(self, begin: Value, stop: Value, out: Value) -> None:
        """Any start, any end: single values up to a whole chunk, chunks, single values."""
        e, size = self.e, ITEMSIZE[self.dtype]
        aligned = self.e.least((begin + (CHUNK - 1)) & -CHUNK, stop)
        with e.loop(begin, aligned) as element:
            self.single(element, out + (element - begin) * size)
        chunks = aligned + ((stop - aligned) & -CHUNK)
        with e.loop(aligned, chunks, CHUNK) as element:
            self.chunk(element, out + (element - begin) * size)
        with e.loop(chunks, stop) as element:
            self.single(element, out + (element - begin) * size)

    def single(self, element: Value, out: Value) -> None:
        e = self.e
        byte = e.convert("zext", e.load(I8, self.packed + (element >> 1)), "i64")
        code = (byte >> (4 - ((element & 1) << 2))) & 15
        value = e.load(F32, self.tables + (code << 2)) * self.scales.at(element >> self.shift)
        store_float(e, self.level, value, out, self.dtype)

    def products(self, scale: Value) -> Value:
        """The 16 values of a block, rounded to 16 bits, in the high half of an i32."""
        e = self.e
        if self.exact or self.dtype != "bf16":
            return round_to(e, self.level, self.levels * e.splat(scale, 16), self.dtype) << 16
        # Adding to the bits of a NaN could make it a number; not to those of this one.
        scale = e.select(e.compare("uno", scale, scale), e.const(F32, float("nan")), scale)
        return e.bits(self.levels * e.splat(scale, 16), Type("i32", 16)) + 0x8000

    def chunk(self, element: Value, out: Value) -> None:
        e, level = self.e, self.level
        block = element >> self.shift
        scales = [self.scales.at(block)]
        if self.halves:
            scales.append(self.scales.at(block + 1))
        address = self.packed + (element >> 1)
        if self.dtype == "f32":
            spread = [e.splat(scale, level.lanes) for scale in scales]
            vectors = level.ordered32(e, address, self.table)
            found = [v * spread[len(spread) * i // len(vectors)] for i, v in enumerate(vectors)]
        else:
            products = [self.products(scale) for scale in scales]
            found = level.ordered16(e, address, products[0], products[-1])
        for i, vector in enumerate(found):
            e.store(vector, out + i * (CHUNK // len(found)) * ITEMSIZE[self.dtype])
