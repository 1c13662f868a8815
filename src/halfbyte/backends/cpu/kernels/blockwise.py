"""8-bit blockwise codes: rank among the midpoints of any map by float bits, and the way back."""

from __future__ import annotations

from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.level import Level
from halfbyte.backends.cpu.kernels.quantize import UNIT, Blocks
from halfbyte.backends.cpu.kernels.ssa import F32, I8, Value
from halfbyte.backends.cpu.kernels.values import ITEMSIZE, store_float

__all__ = ["DEQUANTIZE_ARGUMENTS", "QUANTIZE_ARGUMENTS", "emit_dequantize", "emit_quantize"]

QUANTIZE_ARGUMENTS = (
    "source",
    "out",
    "absmax",
    "buckets",
    "shift",
    "blocks",
    "blocksize",
    "blocks_a_piece",
)
"""``buckets``: address of bucket 0 of :class:`halfbyte.backends.cpu.tables.Buckets`. Its lowest byte is the code up to
its midpoint, the open bits of that midpoint are its highest. With repeats the second byte counts to the next code."""

DEQUANTIZE_ARGUMENTS = ("source", "out", "absmax", "code", "numel", "blocks", "blocksize", "blocks_a_piece")


def emit_quantize(e: Emitter, level: Level, *, dtype: str, repeats: bool) -> None:
    """Write the kernel that quantizes floats of ``dtype``: keys in registers, then one table entry for each value."""
    source, out, absmax, buckets, shift, blocks, blocksize, a_piece = (e.argument(name) for name in QUANTIZE_ARGUMENTS)
    walk = Blocks(e, level, dtype)
    shift = e.splat(e.convert("trunc", shift, "i32"), level.lanes)
    with e.pieces() as piece:
        start = piece * a_piece
        stop = e.least(start + a_piece, blocks)
        with e.loop(start, stop) as block:
            address = source + block * blocksize * ITEMSIZE[dtype]
            scale = walk.absmax(address, blocksize)
            e.store(scale, absmax + (block << 2))
            factors = walk.factors(scale)
            for condition, scaling in walk.scalings(scale, factors):
                with e.when(condition), e.loop(0, blocksize, UNIT) as unit:
                    for line in range(0, UNIT * ITEMSIZE[dtype], 64):  # of the next block, whose absmax comes first
                        e.prefetch(address + (blocksize + unit) * ITEMSIZE[dtype] + line)
                    values = walk.load_unit(address + unit * ITEMSIZE[dtype])
                    codes = [_code(e, level, walk.scaled(value, scaling), buckets, shift, repeats) for value in values]
                    e.store(level.narrow(e, codes), out + block * blocksize + unit)


def _code(e: Emitter, level: Level, scaled: Value, buckets: Value, shift: Value, repeats: bool) -> Value:
    """Rank of each value: that of its bucket, one more if its open bits are above those of the midpoint."""
    bits = e.bits(scaled, scaled.type.of("i32"))
    ordered = bits ^ (e.shift_sign(bits, 31) & 0x7FFFFFFF)
    bucket = level.gather(e, buckets, e.shift_sign(ordered, shift))
    above = e.compare("sgt", (ordered << (32 - shift)) ^ 0x80000000, bucket)
    above = e.convert("sext", above, "i32")
    return (bucket + (above & (bucket >> 8)) if repeats else bucket - above) & 0xFF


def emit_dequantize(e: Emitter, level: Level, *, dtype: str) -> None:
    """Write the kernel that decodes to ``dtype``; the last block may be short."""
    source, out, absmax, code, numel, blocks, blocksize, a_piece = (e.argument(name) for name in DEQUANTIZE_ARGUMENTS)
    size = ITEMSIZE[dtype]
    with e.pieces() as piece:
        start = piece * a_piece
        stop = e.least(start + a_piece, blocks)
        with e.loop(start, stop) as block:
            scale = e.load(F32, absmax + (block << 2))
            wide = e.splat(scale, level.lanes)
            begin = block * blocksize
            end = begin + blocksize
            end = e.least(end, numel)
            whole = begin + ((end - begin) & -level.lanes)
            with e.loop(begin, whole, level.lanes) as element:
                found = e.undef(wide.type)
                for lane in range(level.lanes):
                    found = e.insert(found, _value(e, code, source + element + lane), lane)
                store_float(e, level, found * wide, out + element * size, dtype)
            with e.loop(whole, end) as element:
                store_float(e, level, _value(e, code, source + element) * scale, out + element * size, dtype)


def _value(e: Emitter, code: Value, address: Value) -> Value:
    return e.load(F32, code + (e.convert("zext", e.load(I8, address), "i64") << 2))
