"""Levels that keep codes as bytes and values as byte planes: AVX2 (``vpshufb``) and NEON (``tbl``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.level import (
    CHUNK,
    CHUNK_BYTES,
    TABLE_COARSE_PLANES,
    TABLE_EXACT_PLANES,
    Level,
    Vector,
    spread,
)
from halfbyte.backends.cpu.kernels.ssa import I8, Type, Value

__all__ = ["PlaneLevel"]


@dataclass(frozen=True, eq=False)
class PlaneLevel(Level):
    """Codes as bytes, values as byte planes."""

    def kind(self, dtype: str) -> str:
        return "coarse" if dtype == "bf16" else "exact"

    def shuffle_bytes(self, e: Emitter, table: Value, codes: Value) -> Value:
        return self._shuffle(e, spread(e, table, self.register_bytes), codes)

    def _shuffle(self, e: Emitter, plane: Value, codes: Value) -> Value:
        name = "llvm.aarch64.neon.tbl1.v16i8" if self.machine == "aarch64" else "llvm.x86.avx2.pshuf.b"
        return e.call(name, codes.type, [plane, codes])

    def table(self, e: Emitter, address: Value, kind: str) -> object:
        count, start = (2, TABLE_COARSE_PLANES) if kind == "coarse" else (4, TABLE_EXACT_PLANES)
        return [
            spread(e, e.load(Type("i8", 16), address + (start + 16 * plane)), self.register_bytes)
            for plane in range(count)
        ]

    def _unpack(self, e: Emitter, left: Value, right: Value, part: int) -> Value:
        """Alternate lanes of the first (part 0) or second half of every 16 bytes, as elements of twice the size."""
        n, size = left.type.lanes, int(left.type.elem[1:]) // 8
        per = 16 // size
        mask: list[int] = []
        for start in range(part * per // 2, n, per):
            for i in range(start, start + per // 2):
                mask += [i, n + i]
        return e.bits(e.shuffle(left, right, mask), Type(f"i{16 * size}", n // 2))

    @staticmethod
    def _unpacked(elements: Sequence[int], part: int, per: int) -> tuple[int, ...]:
        return tuple(
            elements[start + i] for start in range(part * per // 2, len(elements), per) for i in range(per // 2)
        )

    def _values(self, e: Emitter, codes: Value, elements: Sequence[int], planes: Sequence[Value]) -> Iterator[Vector]:
        """16-bit values of byte codes (two planes), or fp32 values (four)."""
        found = [self._shuffle(e, plane, codes) for plane in planes]
        for part in range(2):
            low, names = self._unpack(e, found[0], found[1], part), self._unpacked(elements, part, 16)
            if len(planes) == 2:
                yield Vector(low, names)
                continue
            high = self._unpack(e, found[2], found[3], part)
            for quarter in range(2):
                whole = self._unpack(e, low, high, quarter)
                yield Vector(e.bits(whole, whole.type.of("float")), self._unpacked(names, quarter, 8))

    def _raw(self, e: Emitter, address: Value) -> Iterator[tuple[Value, Value, tuple[int, ...], tuple[int, ...]]]:
        for start in range(0, CHUNK_BYTES, self.register_bytes):
            packed = e.load(Type("i8", self.register_bytes), address + start)
            even = tuple(2 * (start + i) for i in range(self.register_bytes))
            yield packed >> 4, packed & 15, even, tuple(i + 1 for i in even)

    def decode(self, e: Emitter, address: Value, table: object, kind: str) -> Iterator[Vector]:
        assert isinstance(table, list)
        for high, low, even, odd in self._raw(e, address):
            for codes, elements in ((high, even), (low, odd)):
                for vector in self._values(e, codes, elements, table):
                    if kind != "coarse":
                        yield vector
                        continue
                    pairs = e.bits(vector.value, Type("i32", self.lanes))
                    single = Type("float", self.lanes)
                    yield Vector(e.bits(pairs << 16, single), vector.elements[0::2])
                    yield Vector(e.bits(pairs & 0xFFFF0000, single), vector.elements[1::2])

    def order(self, kind: str) -> tuple[int, ...]:
        e = Emitter("order", [])
        address = Value(e, Type("i64"), "0")
        return tuple(
            i for vector in self.decode(e, address, self.table(e, address, kind), kind) for i in vector.elements
        )

    def _in_order(self, e: Emitter, vectors: Sequence[Vector]) -> list[Value]:
        """The same values in row-major order: 16-byte quarters are put together by their first element."""
        lanes = vectors[0].value.type.lanes
        per = lanes * 16 // self.register_bytes
        quarters = sorted(
            ((v.elements[i], v.value, i) for v in vectors for i in range(0, lanes, per)), key=lambda found: found[0]
        )
        found: list[Value] = []
        for start in range(0, len(quarters), lanes // per):
            group = quarters[start : start + lanes // per]
            if len(group) == 1:
                found.append(group[0][1])
                continue
            (_, left, i), (_, right, j) = group
            found.append(e.shuffle(left, right, [*range(i, i + per), *range(lanes + j, lanes + j + per)]))
        return found

    def _ordered_codes(self, e: Emitter, address: Value) -> Iterator[Vector]:
        for high, low, even, odd in self._raw(e, address):
            for part in range(2):
                codes = e.bits(self._unpack(e, high, low, part), high.type)
                pairs = zip(self._unpacked(even, part, 16), self._unpacked(odd, part, 16), strict=True)
                yield Vector(codes, tuple(i for pair in pairs for i in pair))

    def ordered32(self, e: Emitter, address: Value, table: object) -> list[Value]:
        assert isinstance(table, list)
        vectors = [
            vector
            for codes in self._ordered_codes(e, address)
            for vector in self._values(e, codes.value, codes.elements, table)
        ]
        return self._in_order(e, vectors)

    def ordered16(self, e: Emitter, address: Value, first: Value, second: Value) -> list[Value]:
        halves = [
            [e.convert("trunc", products >> 16, "i8"), e.convert("trunc", products >> 24, "i8")]
            for products in ((first,) if first is second else (first, second))
        ]
        vectors: list[Vector] = []
        for codes in self._ordered_codes(e, address):
            planes: list[Value] = []
            for plane in range(2):
                sides = [
                    halves[-1 if codes.elements[i] >= CHUNK // 2 else 0][plane]
                    for i in range(0, len(codes.elements), 16)
                ]
                mask = [i % 16 + (0 if sides[i // 16] is sides[0] else 16) for i in range(self.register_bytes)]
                planes.append(e.shuffle(sides[0], sides[-1], mask))
            vectors += self._values(e, codes.value, codes.elements, planes)
        return self._in_order(e, vectors)

    def narrow(self, e: Emitter, words: Sequence[Value]) -> Value:
        if self.machine == "aarch64" or len(words) != 4:
            return super().narrow(e, words)
        halves = [
            e.call("llvm.x86.avx2.packusdw", Type("i16", 16), [words[0], words[1]]),
            e.call("llvm.x86.avx2.packusdw", Type("i16", 16), [words[2], words[3]]),
        ]
        mixed = e.bits(e.call("llvm.x86.avx2.packuswb", Type("i8", 32), halves), Type("i32", 8))
        # Both packed 128 bits at a time: fours of values lie 0, 2, 4, 6, then 1, 3, 5, 7.
        return e.bits(e.shuffle(mixed, None, [0, 4, 1, 5, 2, 6, 3, 7]), Type("i8", 32))

    def gather(self, e: Emitter, address: Value, index: Value) -> Value:
        if self.machine == "aarch64":
            return super().gather(e, address, index)
        every = e.const(index.type, -1)
        arguments = [e.undef(index.type), e.as_pointer(address), index, every, e.const(I8, 4)]
        return e.call("llvm.x86.avx2.gather.d.d.256", index.type, arguments)

    def tree(self, e: Emitter, address: Value) -> object:
        if self.machine == "aarch64":
            return [e.load(Type("i8", 16), address + 16 * part) for part in range(4)]
        first, second = (e.load(Type("float", 8), address + 32 * part) for part in range(2))
        return [first, second, e.shuffle(first, None, [4, 5, 6, 7] * 2)]

    def node(self, e: Emitter, tree: object, index: Value, depth: int) -> Value:
        assert isinstance(tree, list)
        if self.machine == "aarch64":
            offsets = e.bits(index * 0x04040404 + 0x03020100, Type("i8", 16))
            found = e.call("llvm.aarch64.neon.tbl4.v16i8", offsets.type, [*tree, offsets])
            return e.bits(found, index.type.of("float"))
        if depth == 2:  # the second four, in both halves; reads the two low bits of the index only
            return e.call("llvm.x86.avx.vpermilvar.ps.256", index.type.of("float"), [tree[2], index])
        # reads the three low bits of the index only
        return e.call("llvm.x86.avx2.permps", index.type.of("float"), [tree[1], index])
