"""Steps that several kernels share: reading and rounding activations of a dtype, absmax plain and nested."""

from __future__ import annotations

from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.level import Level
from halfbyte.backends.cpu.kernels.ssa import F32, I8, Type, Value

__all__ = ["ITEMSIZE", "Scales", "load_float", "round_to", "store_float"]

ITEMSIZE = {"f32": 4, "bf16": 2, "f16": 2}


def load_float(e: Emitter, level: Level, address: Value, dtype: str, lanes: int = 0) -> Value:
    """fp32 value of what lies at ``address`` in ``dtype``; ``lanes`` values as a vector, one scalar if 0."""
    if dtype == "f32":
        return e.load(Type("float", lanes), address)
    if dtype == "f16" and level.half_native:
        return e.convert("fpext", e.load(Type("half", lanes), address), "float")
    bits = e.convert("zext", e.load(Type("i16", lanes), address), "i32")
    single = Type("float", lanes)
    if dtype == "bf16":
        return e.bits(bits << 16, single)
    magnitude = (bits & 0x7FFF) << 13
    value = e.bits(magnitude, single) * 2.0**112  # exact: also for subnormals
    special = e.compare("ugt", magnitude, 0x0F7FFFFF)
    whole = e.select(special, magnitude | 0x7F800000, e.bits(value, magnitude.type))
    return e.bits(whole | ((bits & 0x8000) << 16), single)


def round_to(e: Emitter, level: Level, value: Value, dtype: str) -> Value:
    """fp32 rounded to nearest even: bits of ``dtype`` in the low half of an i32, NaN stays NaN; fp32 is returned."""
    if dtype == "f32":
        return value
    word = value.type.of("i32")
    if dtype == "f16" and level.half_native:
        half = e.bits(e.convert("fptrunc", value, "half"), value.type.of("i16"))
        return e.convert("zext", half, "i32")
    bits = e.bits(value, word)
    nan = e.compare("uno", value, value)
    if dtype == "bf16":
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return e.select(nan, e.const(word, 0x7FC0), rounded)
    magnitude, sign = bits & 0x7FFFFFFF, (bits >> 16) & 0x8000
    # Below the smallest normal, adding 0.5 lets the FPU round at the right bit.
    subnormal = e.bits(e.bits(magnitude, value.type) + 0.5, word) - 0x3F000000
    normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    rounded = e.select(e.compare("ult", magnitude, 0x38800000), subnormal, normal)
    rounded = e.select(e.compare("ugt", magnitude, 0x477FEFFF), e.const(word, 0x7C00), rounded)
    return e.select(nan, e.const(word, 0x7E00), rounded) | sign


def store_float(e: Emitter, level: Level, value: Value, address: Value, dtype: str) -> None:
    """Store fp32, scalar or vector, at ``address`` in ``dtype``."""
    rounded = round_to(e, level, value, dtype)
    e.store(rounded if dtype == "f32" else e.convert("trunc", rounded, "i16"), address)


class Scales:
    """Reads absmax by block number, double-quantized or not; its arguments are the four tensors' addresses."""

    ARGUMENTS = ("absmax", "absmax_8bit", "absmax_code", "absmax_offset")

    def __init__(self, e: Emitter, nested: bool) -> None:
        self._e, self._nested = e, nested
        self._absmax = e.argument("absmax")
        if nested:
            self._codes, self._map = e.argument("absmax_8bit"), e.argument("absmax_code")
            self._offset = e.load(F32, e.argument("absmax_offset"))

    def at(self, block: Value) -> Value:
        """fp32 absmax of the block with that i64 number."""
        e = self._e
        if not self._nested:
            return e.load(F32, self._absmax + (block << 2))
        code = e.convert("zext", e.load(I8, self._codes + block), "i64")
        second = e.load(F32, self._absmax + ((block >> 8) << 2))
        return e.load(F32, self._map + (code << 2)) * second + self._offset
