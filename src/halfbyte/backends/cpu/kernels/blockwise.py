"""8-bit blockwise codes: rank among the midpoints of any map by float bits, and the way back."""

from __future__ import annotations

from halfbyte.backends.cpu.kernels.emitter import F32, I8, I32, Emitter, Type, Value
from halfbyte.backends.cpu.kernels.levels import Level
from halfbyte.backends.cpu.kernels.quantize import UNIT, Blocks
from halfbyte.backends.cpu.kernels.values import ITEMSIZE, store_float

__all__ = ["DEQUANTIZE_ARGUMENTS", "QUANTIZE_ARGUMENTS", "emit_dequantize", "emit_quantize"]

QUANTIZE_ARGUMENTS = (
    "source",
    "out",
    "absmax",
    "buckets",
    "key_shift",
    "key_low",
    "key_count",
    "blocks",
    "blocksize",
    "blocks_a_piece",
)
"""``buckets``: 8 bytes each, fp32 midpoint, code up to it, code above it. First ``key_count`` for positive values by
rising magnitude, then as many for negative ones, then one for NaN. The key of a magnitude is its bits shifted right by
``key_shift``, held between ``key_low`` and ``key_low + key_count - 1``."""

DEQUANTIZE_ARGUMENTS = ("source", "out", "absmax", "code", "numel", "blocks", "blocksize", "blocks_a_piece")


def emit_quantize(e: Emitter, level: Level, *, dtype: str) -> None:
    """Write the kernel that quantizes floats of ``dtype``: keys in registers, then one table entry for each value."""
    source, out, absmax, buckets, shift, low, count, blocks, blocksize, a_piece = (
        e.argument(name) for name in QUANTIZE_ARGUMENTS
    )
    walk, word = Blocks(e, level, dtype), Type("i32", level.lanes)
    shift, low, count = (e.splat(e.convert("trunc", value, "i32"), level.lanes) for value in (shift, low, count))
    values, keys = e.buffer(F32, UNIT), e.buffer(I32, UNIT)
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
                    scaled = value * factors[0] * factors[1]
                    bits = e.bits(scaled, word)
                    key = e.minimum(e.maximum((bits & 0x7FFFFFFF) >> shift, low) - low, count - 1)
                    key = key + (e.select(e.compare("slt", bits, 0), count, 0))
                    key = e.select(e.compare("uno", scaled, scaled), count + count, key)
                    e.store(scaled, values + 4 * level.lanes * i)
                    e.store(key, keys + 4 * level.lanes * i)
                to = out + block * blocksize + unit
                for i in range(UNIT):
                    entry = buckets + (e.convert("zext", e.load(I32, keys + 4 * i), "i64") << 3)
                    above = e.compare("ogt", e.load(F32, values + 4 * i), e.load(F32, entry))
                    found = e.load(I32, entry + 4) >> (e.convert("zext", above, "i32") << 3)
                    e.store(e.convert("trunc", found, "i8"), to + i)


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
