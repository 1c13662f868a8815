"""8-bit blockwise codes: rank among the midpoints of any map by float bits, and the way back."""

from __future__ import annotations

from halfbyte.backends.cpu.kernels.emitter import F32, I8, I32, Emitter, Value
from halfbyte.backends.cpu.kernels.level import Level
from halfbyte.backends.cpu.kernels.quantize import UNIT, Blocks
from halfbyte.backends.cpu.kernels.values import ITEMSIZE, store_float

__all__ = ["DEQUANTIZE_ARGUMENTS", "QUANTIZE_ARGUMENTS", "emit_dequantize", "emit_quantize"]

QUANTIZE_ARGUMENTS = (
    "source",
    "out",
    "absmax",
    "buckets",
    "key_low",
    "key_count",
    "blocks",
    "blocksize",
    "blocks_a_piece",
)
"""``buckets``: one u32 for each range of values that share the upper half of their fp32 bits: in its own upper half
what the lower half (turned around for negative values, so that it rises with them) must exceed for the next code, in
its lowest byte the code up to there. First ``key_count`` for positive values by rising magnitude, then as many for
negative ones, then one for zero and one for NaN. ``key_low``: upper half of the first; first and last take all beyond.
"""

DEQUANTIZE_ARGUMENTS = ("source", "out", "absmax", "code", "numel", "blocks", "blocksize", "blocks_a_piece")


def emit_quantize(e: Emitter, level: Level, *, dtype: str) -> None:
    """Write the kernel that quantizes floats of ``dtype``: keys in registers, then one table entry for each value."""
    source, out, absmax, buckets, low, count, blocks, blocksize, a_piece = (
        e.argument(name) for name in QUANTIZE_ARGUMENTS
    )
    walk = Blocks(e, level, dtype)
    low, count = (e.splat(e.convert("trunc", value, "i32"), level.lanes) for value in (low, count))
    lower, keys = e.buffer(I32, UNIT), e.buffer(I32, UNIT)
    with e.pieces() as piece:
        start = piece * a_piece
        stop = e.select(e.compare("slt", start + a_piece, blocks), start + a_piece, blocks)
        with e.loop(start, stop) as block:
            address = source + block * blocksize * ITEMSIZE[dtype]
            scale = walk.absmax(address, blocksize)
            e.store(scale, absmax + (block << 2))
            factors = walk.factors(scale)
            with e.loop(0, blocksize, UNIT) as unit:
                for i, value in enumerate(walk.load_unit(address + unit * ITEMSIZE[dtype])):
                    key, low_bits = _key(e, value * factors[0] * factors[1], low, count)
                    e.store(low_bits, lower + 4 * level.lanes * i)
                    e.store(key, keys + 4 * level.lanes * i)
                to = out + block * blocksize + unit
                for i in range(UNIT):
                    key = e.convert("zext", e.load(I32, keys + 4 * i), "i64")
                    bucket = e.load(I32, buckets + (key << 2))
                    above = e.convert("zext", e.compare("ugt", e.load(I32, lower + 4 * i), bucket), "i32")
                    e.store(e.convert("trunc", bucket + above, "i8"), to + i)


def _key(e: Emitter, scaled: Value, low: Value, count: Value) -> tuple[Value, Value]:
    """Bucket of each value, and its lower bits in the upper half."""
    bits = e.bits(scaled, scaled.type.of("i32"))
    magnitude = bits & 0x7FFFFFFF
    sign = e.convert("sext", e.compare("slt", bits, 0), "i32")
    key = e.minimum(e.maximum(magnitude >> 16, low) - low, count - 1) + (sign & count)
    key = e.select(e.compare("eq", magnitude, 0), count + count, key)
    key = e.select(e.compare("uno", scaled, scaled), count + count + 1, key)
    return key, (bits ^ sign) << 16


def emit_dequantize(e: Emitter, level: Level, *, dtype: str) -> None:
    """Write the kernel that decodes to ``dtype``; the last block may be short."""
    source, out, absmax, code, numel, blocks, blocksize, a_piece = (e.argument(name) for name in DEQUANTIZE_ARGUMENTS)
    size = ITEMSIZE[dtype]
    with e.pieces() as piece:
        start = piece * a_piece
        stop = e.select(e.compare("slt", start + a_piece, blocks), start + a_piece, blocks)
        with e.loop(start, stop) as block:
            scale = e.load(F32, absmax + (block << 2))
            wide = e.splat(scale, level.lanes)
            begin = block * blocksize
            end = begin + blocksize
            end = e.select(e.compare("slt", end, numel), end, numel)
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
