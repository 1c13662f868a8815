"""Typed SSA values of LLVM IR with Python's operators, and mutable locals; :class:`Emitter` writes what they do."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halfbyte.backends.cpu.kernels.emitter import Emitter

__all__ = ["F32", "I8", "I16", "I32", "I64", "Type", "Value", "Variable", "literal"]


@dataclass(frozen=True)
class Type:
    """An LLVM element type and its number of lanes; 0 lanes for a scalar."""

    elem: str
    lanes: int = 0

    def __str__(self) -> str:
        return f"<{self.lanes} x {self.elem}>" if self.lanes else self.elem

    @property
    def is_float(self) -> bool:
        return self.elem in {"float", "half", "bfloat"}

    @property
    def suffix(self) -> str:
        """How intrinsic names spell the type: ``v8f32``."""
        short = {"float": "f32", "half": "f16", "bfloat": "bf16"}.get(self.elem, self.elem)
        return f"v{self.lanes}{short}" if self.lanes else short

    def of(self, elem: str) -> Type:
        """As many lanes of another element type."""
        return Type(elem, self.lanes)


I8, I16, I32, I64, F32 = (Type(name) for name in ("i8", "i16", "i32", "i64", "float"))


def literal(type_: Type, value: float) -> str:
    """The constant as LLVM spells it."""
    if type_.is_float:
        rounded = struct.unpack("<f", struct.pack("<f", value))[0]
        return f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"
    bits = int(type_.elem[1:])
    whole = int(value) & ((1 << bits) - 1)
    return str(whole - (1 << bits) if bits > 1 and whole >> (bits - 1) else whole)


class Value:
    """An SSA value; arithmetic follows its type, Python numbers become constants of that type."""

    __slots__ = ("emitter", "name", "type")

    def __init__(self, emitter: Emitter, type_: Type, name: str) -> None:
        self.emitter, self.type, self.name = emitter, type_, name

    def _binary(self, whole: str, real: str, other: Value | float, swap: bool = False) -> Value:
        e = self.emitter
        right = e.like(self, other)
        left, right = (right, self) if swap else (self, right)
        return e.emit(self.type, f"{real if self.type.is_float else whole} {self.type} {left.name}, {right.name}")

    def __add__(self, other: Value | float) -> Value:
        return self._binary("add", "fadd", other)

    __radd__ = __add__

    def __sub__(self, other: Value | float) -> Value:
        return self._binary("sub", "fsub", other)

    def __rsub__(self, other: Value | float) -> Value:
        return self._binary("sub", "fsub", other, swap=True)

    def __mul__(self, other: Value | float) -> Value:
        return self._binary("mul", "fmul", other)

    __rmul__ = __mul__

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary("udiv", "fdiv", other)

    def __rtruediv__(self, other: Value | float) -> Value:
        return self._binary("udiv", "fdiv", other, swap=True)

    def __and__(self, other: Value | int) -> Value:
        return self._binary("and", "and", other)

    def __or__(self, other: Value | int) -> Value:
        return self._binary("or", "or", other)

    def __xor__(self, other: Value | int) -> Value:
        return self._binary("xor", "xor", other)

    def __lshift__(self, other: Value | int) -> Value:
        return self._binary("shl", "shl", other)

    def __rshift__(self, other: Value | int) -> Value:
        """Shift right, filling with zeros."""
        return self._binary("lshr", "lshr", other)

    def __gt__(self, other: Value | float) -> Value:
        """Lanes of floats that are greater; NaN is not."""
        return self.emitter.compare("ogt", self, other)

    def __lt__(self, other: Value | float) -> Value:
        """Lanes of floats that are less; NaN is not."""
        return self.emitter.compare("olt", self, other)


class Variable:
    """A mutable local."""

    __slots__ = ("emitter", "slot", "type")

    def __init__(self, emitter: Emitter, type_: Type, slot: str) -> None:
        self.emitter, self.type, self.slot = emitter, type_, slot

    def get(self) -> Value:
        return self.emitter.emit(self.type, f"load {self.type}, {self.emitter.pointer(self.type)} {self.slot}")

    def set(self, value: Value | float) -> None:
        value = self.emitter.as_value(self.type, value)
        self.emitter.line(f"store {self.type} {value.name}, {self.emitter.pointer(self.type)} {self.slot}")
