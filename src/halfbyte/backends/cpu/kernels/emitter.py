"""Writes one kernel as LLVM IR text: instructions, loops and branches; nothing about any CPU.

A kernel is ``void name(i64 block)``. ``block`` is the address of 64-bit words: word 0 is a shared counter, word 1 the
number of pieces of work, the rest are the kernel's arguments. Every thread that runs the function takes pieces from the
counter until none are left, so any number of threads, from any pool, may share one call.

IR is written as text because llvmlite's own builder has no bfloat and spells pointers in one of two ways by version.
Loops keep their variables in stack slots; LLVM turns those into registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from halfbyte.backends.cpu.kernels.ssa import I8, I64, Type, Value, Variable, literal

__all__ = ["Emitter"]

COUNTER, PIECES, FIRST = 0, 1, 2
"""Words of the argument block: the shared counter, the number of pieces, the first argument."""


class Emitter:
    """Builds the text of one kernel.

    Args:
        name: Symbol of the function.
        arguments: Names of the words after the counter and the number of pieces, in the caller's order.
        typed_pointers: Spell pointers as LLVM before 16 does.
        attributes: Function attributes as text.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], *, typed_pointers: bool = False, attributes: str = "nounwind"
    ) -> None:
        self.name, self._arguments, self._typed, self._attributes = name, list(arguments), typed_pointers, attributes
        self._slots: list[str] = []
        self._lines: list[str] = []
        self._declared: dict[str, str] = {}
        self._count = 0

    # Plumbing

    def fresh(self, stem: str = "v") -> str:
        self._count += 1
        return f"%{stem}{self._count}"

    def line(self, text: str) -> None:
        self._lines.append("  " + text)

    def emit(self, type_: Type, text: str) -> Value:
        """Append an instruction and return its result."""
        name = self.fresh()
        self.line(f"{name} = {text}")
        return Value(self, type_, name)

    def pointer(self, type_: Type) -> str:
        return f"{type_}*" if self._typed else "ptr"

    def finish(self) -> str:
        """The module's text."""
        declared = "\n".join(self._declared.values())
        body = "\n".join(["entry:", *self._slots, *self._lines])
        attributes = f"attributes #0 = {{ {self._attributes} }}"
        return f"{declared}\ndefine void @{self.name}(i64 %block) #0 {{\n{body}\n}}\n{attributes}\n"

    # Values

    def const(self, type_: Type, value: float | Sequence[float]) -> Value:
        """A constant; a sequence gives the lanes, one number fills them all."""
        if not type_.lanes:
            assert not isinstance(value, Sequence)
            return Value(self, type_, literal(type_, value))
        lanes = list(value) if isinstance(value, Sequence) else [value] * type_.lanes
        return Value(self, type_, "<" + ", ".join(f"{type_.elem} {literal(type_, lane)}" for lane in lanes) + ">")

    def as_value(self, type_: Type, value: Value | float) -> Value:
        return value if isinstance(value, Value) else self.const(type_, value)

    def like(self, model: Value, value: Value | float) -> Value:
        return self.as_value(model.type, value)

    def undef(self, type_: Type) -> Value:
        return Value(self, type_, "undef")

    def variable(self, type_: Type, value: Value | float) -> Variable:
        slot = self.fresh("s")
        self._slots.append(f"  {slot} = alloca {type_}")
        made = Variable(self, type_, slot)
        made.set(value)
        return made

    def buffer(self, elem: Type, count: int) -> Value:
        """Address of a stack buffer of ``count`` elements, 64-byte aligned."""
        slot = self.fresh("s")
        array = f"[{count} x {elem}]"
        self._slots.append(f"  {slot} = alloca {array}, align 64")
        pointer = f"{array}*" if self._typed else "ptr"
        return self.emit(I64, f"ptrtoint {pointer} {slot} to i64")

    # Conversions

    def convert(self, op: str, value: Value, elem: str) -> Value:
        """``op`` is an LLVM cast between element types: zext, sext, trunc, fpext, fptrunc, uitofp."""
        type_ = value.type.of(elem)
        return value if type_ == value.type else self.emit(type_, f"{op} {value.type} {value.name} to {type_}")

    def bits(self, value: Value, type_: Type) -> Value:
        """The same bits as another type."""
        return value if type_ == value.type else self.emit(type_, f"bitcast {value.type} {value.name} to {type_}")

    def shift_sign(self, value: Value, count: Value | int) -> Value:
        """Shift right, filling with the sign."""
        return self.emit(value.type, f"ashr {value.type} {value.name}, {self.like(value, count).name}")

    # Vectors

    def splat(self, value: Value, lanes: int) -> Value:
        one = Type(value.type.elem, lanes)
        first = self.emit(one, f"insertelement {one} undef, {value.type} {value.name}, i32 0")
        return self.shuffle(first, None, [0] * lanes)

    def shuffle(self, left: Value, right: Value | None, mask: Sequence[int]) -> Value:
        """Lanes ``mask`` of ``left`` and ``right`` one behind the other."""
        other = right.name if right is not None else "undef"
        type_ = Type(left.type.elem, len(mask))
        chosen = ", ".join(f"i32 {lane}" for lane in mask)
        return self.emit(
            type_, f"shufflevector {left.type} {left.name}, {left.type} {other}, <{len(mask)} x i32> <{chosen}>"
        )

    def concat(self, parts: Sequence[Value]) -> Value:
        """The lanes of all parts in a row; the number of parts is a power of two."""
        parts = list(parts)
        while len(parts) > 1:
            lanes = 2 * parts[0].type.lanes
            parts = [self.shuffle(a, b, range(lanes)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def extract(self, vector: Value, lane: int) -> Value:
        return self.emit(Type(vector.type.elem), f"extractelement {vector.type} {vector.name}, i32 {lane}")

    def insert(self, vector: Value, value: Value, lane: int) -> Value:
        return self.emit(
            vector.type, f"insertelement {vector.type} {vector.name}, {value.type} {value.name}, i32 {lane}"
        )

    def compare(self, how: str, left: Value, right: Value | float) -> Value:
        """``how`` as LLVM spells it: eq, ult, slt for integers, ogt, olt, uno, une for floats."""
        right = self.like(left, right)
        op = "fcmp" if left.type.is_float else "icmp"
        return self.emit(left.type.of("i1"), f"{op} {how} {left.type} {left.name}, {right.name}")

    def select(self, condition: Value, yes: Value, no: Value | float) -> Value:
        no = self.like(yes, no)
        return self.emit(
            yes.type, f"select {condition.type} {condition.name}, {yes.type} {yes.name}, {no.type} {no.name}"
        )

    def call(self, name: str, type_: Type, arguments: Sequence[Value], flags: str = "") -> Value:
        """Call the intrinsic ``name``; it is declared on first use."""
        self._declared.setdefault(name, f"declare {type_} @{name}({', '.join(str(a.type) for a in arguments)})")
        listed = ", ".join(f"{a.type} {a.name}" for a in arguments)
        return self.emit(type_, f"call {flags} {type_} @{name}({listed})")

    def effect(self, name: str, arguments: Sequence[Value]) -> None:
        """Call the intrinsic ``name``, which returns nothing; it is declared on first use."""
        self._declared.setdefault(name, f"declare void @{name}({', '.join(str(a.type) for a in arguments)})")
        self.line(f"call void @{name}({', '.join(f'{a.type} {a.name}' for a in arguments)})")

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """``a * b + c``, in one rounding where the CPU can."""
        return self.call(f"llvm.fmuladd.{a.type.suffix}", a.type, [a, b, c])

    def maximum(self, a: Value, b: Value) -> Value:
        """Larger of unsigned integers."""
        return self.call(f"llvm.umax.{a.type.suffix}", a.type, [a, b])

    def minimum(self, a: Value, b: Value) -> Value:
        """Smaller of unsigned integers."""
        return self.call(f"llvm.umin.{a.type.suffix}", a.type, [a, b])

    def least(self, a: Value, b: Value) -> Value:
        """Smaller of signed integers."""
        return self.select(self.compare("slt", a, b), a, b)

    def total(self, vector: Value) -> Value:
        """Sum of the lanes of floats, in any order."""
        scalar = Type(vector.type.elem)
        zero = self.const(scalar, -0.0)
        return self.call(f"llvm.vector.reduce.fadd.{vector.type.suffix}", scalar, [zero, vector], flags="reassoc")

    def largest(self, vector: Value) -> Value:
        """Largest of the lanes of unsigned integers."""
        return self.call(f"llvm.vector.reduce.umax.{vector.type.suffix}", Type(vector.type.elem), [vector])

    # Memory

    def _at(self, address: Value, type_: Type) -> str:
        pointer = self.pointer(type_)
        return f"{pointer} {self.emit(I64, f'inttoptr i64 {address.name} to {pointer}').name}"

    def as_pointer(self, address: Value) -> Value:
        """The address as intrinsics take it."""
        pointer = Type(self.pointer(I8))
        return self.emit(pointer, f"inttoptr i64 {address.name} to {pointer}")

    def fetch_add(self, address: Value, count: int) -> Value:
        """Add to the i64 at ``address``, whoever else does so at the same time, and return what it was."""
        return self.emit(I64, f"atomicrmw add {self._at(address, I64)}, i64 {count} monotonic")

    def load(self, type_: Type, address: Value) -> Value:
        """Load from any alignment."""
        return self.emit(type_, f"load {type_}, {self._at(address, type_)}, align 1")

    def store(self, value: Value, address: Value, *, volatile: bool = False) -> None:
        """Store at any alignment. ``volatile`` keeps LLVM from making a masked store of a select of the old value."""
        how = "store volatile" if volatile else "store"
        self.line(f"{how} {value.type} {value.name}, {self._at(address, value.type)}, align 1")

    def prefetch(self, address: Value) -> None:
        name = "llvm.prefetch.p0i8" if self._typed else "llvm.prefetch.p0"
        self._declared.setdefault(name, f"declare void @{name}({self.pointer(I8)}, i32, i32, i32)")
        self.line(f"call void @{name}({self._at(address, I8)}, i32 0, i32 3, i32 1)")

    # Control

    def _label(self, label: str) -> None:
        self._lines.append(f"{label[1:]}:")

    @contextmanager
    def loop(self, start: Value | int, stop: Value | int, step: Value | int = 1) -> Iterator[Value]:
        """Count an i64 from ``start`` up to below ``stop``."""
        start, stop, step = (self.as_value(I64, bound) for bound in (start, stop, step))
        counter = self.variable(I64, start)
        head, body, end = self.fresh("head"), self.fresh("body"), self.fresh("end")
        self.line(f"br label {head}")
        self._label(head)
        index = counter.get()
        self.line(f"br i1 {self.compare('slt', index, stop).name}, label {body}, label {end}")
        self._label(body)
        yield index
        counter.set(index + step)
        self.line(f"br label {head}")
        self._label(end)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Run the body if the i1 ``condition`` holds."""
        yes, end = self.fresh("yes"), self.fresh("end")
        self.line(f"br i1 {condition.name}, label {yes}, label {end}")
        self._label(yes)
        yield
        self.line(f"br label {end}")
        self._label(end)

    # The argument block

    def _word(self, index: int) -> Value:
        return self.load(I64, Value(self, I64, "%block") + 8 * index)

    def argument(self, name: str) -> Value:
        """The word called ``name``; ask before :meth:`pieces`."""
        return self._word(FIRST + self._arguments.index(name))

    def ticket(self, name: str) -> Value:
        """Number of this thread among those that run the call, from 0; the caller passes 0 as the word ``name``."""
        return self.fetch_add(Value(self, I64, "%block") + 8 * (FIRST + self._arguments.index(name)), 1)

    @contextmanager
    def pieces(self, after: Callable[[], None] = lambda: None) -> Iterator[Value]:
        """Run the body for every piece of work that this thread gets; then what ``after`` writes; then it returns."""
        count = self._word(PIECES)
        again, body, end = self.fresh("again"), self.fresh("body"), self.fresh("end")
        self.line(f"br label {again}")
        self._label(again)
        piece = self.fetch_add(Value(self, I64, "%block"), 1)
        self.line(f"br i1 {self.compare('slt', piece, count).name}, label {body}, label {end}")
        self._label(body)
        yield piece
        self.line(f"br label {again}")
        self._label(end)
        after()
        self.line("ret void")
