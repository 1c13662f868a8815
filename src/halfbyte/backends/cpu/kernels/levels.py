"""What differs between CPUs: lanes, compiler target, and how 16 values are looked up; the algorithms are elsewhere.

Two families. *Lanes*: a code sits in each 32-bit lane and one permute reads the table (AVX-512), or scalar loads do
(portable). *Planes*: codes stay bytes, a byte shuffle (``vpshufb``, ``tbl``) reads one byte of every value, and
interleaving the byte planes makes the values (AVX2, NEON). The families hand out values in whatever order is cheapest
and say which element each lane holds, so that activations can be put into the same order once a call.

A *chunk* is 32 packed bytes, 64 codes: every level works on whole chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from halfbyte.backends.cpu.kernels.emitter import F32, I8, I32, Emitter, Type, Value

__all__ = ["CHUNK", "LEVELS", "LaneLevel", "Level", "PlaneLevel", "Vector"]

CHUNK = 64
CHUNK_BYTES = CHUNK // 2

TABLE_EXACT, TABLE_EXACT_PLANES, TABLE_COARSE, TABLE_COARSE_PLANES, TABLE_BYTES = 0, 64, 128, 160, 192
"""Where a codebook's lookup block holds 16 fp32, their 4 byte planes, 16 bf16, their 2 byte planes; its size."""


@dataclass(frozen=True)
class Vector:
    """A vector of values and, lane by lane, which of the chunk's 64 elements they are."""

    value: Value
    elements: tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """One CPU level.

    Attributes:
        name: What ``HALFBYTE_CPU_FEATURES`` calls it.
        machine: Machine that it belongs to, as ``platform.machine()`` says; empty for every machine.
        cpu: Compiler target, the same on every machine of the level; empty for the machine's baseline.
        features: Added to ``cpu``, as LLVM spells them.
        needs: What the host must report to run it.
        lanes: fp32 values in a register.
        half_native: The CPU converts fp16 itself.
        dot_bf16: Products of bf16 pairs are summed by one instruction.
        wide_lookup: 32 values are looked up about as fast as 16.
    """

    name: str
    machine: str
    cpu: str
    features: str
    needs: frozenset[str]
    lanes: int
    half_native: bool = True
    dot_bf16: bool = False
    wide_lookup: bool = False

    @property
    def register_bytes(self) -> int:
        return 4 * self.lanes

    def kind(self, dtype: str) -> str:
        """How levels are represented beside activations of ``dtype``: exact fp32, coarse (bf16 levels), or dot."""
        raise NotImplementedError

    def table(self, e: Emitter, address: Value, kind: str) -> object:
        """Load the lookup block at ``address`` into registers, before the loops."""
        raise NotImplementedError

    def decode(self, e: Emitter, address: Value, table: object, kind: str) -> Iterator[Vector]:
        """The chunk at ``address`` as fp32 (bf16 for dot) levels, in the cheapest order."""
        raise NotImplementedError

    def order(self, kind: str) -> tuple[int, ...]:
        """The order in which :meth:`decode` hands out a chunk's 64 elements."""
        raise NotImplementedError

    def ordered32(self, e: Emitter, address: Value, table: object) -> list[Value]:
        """The chunk as fp32 levels in row-major order."""
        raise NotImplementedError

    def ordered16(self, e: Emitter, address: Value, first: Value, second: Value) -> list[Value]:
        """The chunk in row-major order as 16-bit values out of two tables, one for each half of the chunk.

        Args:
            first: ``<16 x i32>``, the value of each code in the chunk's first 32 elements, in the high 16 bits; the
                low ones do not matter.
            second: The same for the last 32.
        """
        raise NotImplementedError

    def node(self, e: Emitter, tree: object, index: Value, depth: int) -> Value:
        """Entry ``index`` (i32 lanes, ``2**depth`` to ``2**(depth+1)-1``) of a search tree of 16 fp32."""
        raise NotImplementedError

    def tree(self, e: Emitter, address: Value) -> object:
        """Load a search tree of 16 fp32, before the loops."""
        raise NotImplementedError

    def wide_table(self, e: Emitter, address: Value, elem: str) -> object:
        """Load 32 fp32 or i32, before the loops; with ``wide_lookup``."""
        raise NotImplementedError

    def lookup_wide(self, e: Emitter, table: object, index: Value, elem: str) -> Value:
        """Entries of a wide table; only the five low bits of the i32 ``index`` count."""
        raise NotImplementedError

    def shuffle_bytes(self, e: Emitter, table: Value, codes: Value) -> Value:
        """``table[code]`` for one register of codes below 16; ``table`` is ``<16 x i8>``."""
        raise NotImplementedError

    def lookup_bytes(self, e: Emitter, table: Value, codes: Value) -> Value:
        """``table[code]`` for any power-of-two number of codes below 16."""
        size = min(self.register_bytes, codes.type.lanes)
        parts = [
            self.shuffle_bytes(e, table, e.shuffle(codes, None, range(start, start + size)))
            for start in range(0, codes.type.lanes, size)
        ]
        return e.concat(parts)


def _spread(e: Emitter, table: Value, size: int) -> Value:
    return e.shuffle(table, None, [i % 16 for i in range(size)])


@dataclass(frozen=True)
class LaneLevel(Level):
    """A code in each 32-bit lane."""

    def kind(self, dtype: str) -> str:
        return "dot" if dtype == "bf16" and self.dot_bf16 else "exact"

    @property
    def _permutes(self) -> bool:
        return self.lanes == 16

    def table(self, e: Emitter, address: Value, kind: str) -> object:
        if kind == "dot":
            return e.shuffle(e.load(Type("i16", 16), address + TABLE_COARSE), None, [i % 16 for i in range(32)])
        return e.load(Type("float", 16), address) if self._permutes else address

    def _scalar_lookup(self, e: Emitter, address: Value, index: Value, elem: Type) -> Value:
        found = e.undef(index.type.of(elem.elem))
        for lane in range(index.type.lanes):
            offset = e.convert("zext", e.extract(index, lane), "i64") << 2
            found = e.insert(found, e.load(elem, address + offset), lane)
        return found

    def _levels(self, e: Emitter, table: object, index: Value) -> Value:
        assert isinstance(table, Value)
        if self._permutes:  # reads the four low bits of the index only
            return e.call("llvm.x86.avx512.permvar.sf.512", table.type, [table, index])
        return self._scalar_lookup(e, table, index & 15, F32)

    def order(self, kind: str) -> tuple[int, ...]:
        width = CHUNK_BYTES if kind == "dot" else self.lanes
        found: list[int] = []
        for start in range(0, CHUNK, 2 * width):
            found += [*range(start, start + 2 * width, 2), *range(start + 1, start + 2 * width, 2)]
        return tuple(found)

    def decode(self, e: Emitter, address: Value, table: object, kind: str) -> Iterator[Vector]:
        assert isinstance(table, Value)
        order, width = self.order(kind), CHUNK_BYTES if kind == "dot" else self.lanes
        for part, start in enumerate(range(0, CHUNK_BYTES, width)):
            codes = e.convert("zext", e.load(Type("i8", width), address + start), "i16" if kind == "dot" else "i32")
            for half, index in enumerate((codes >> 4, codes)):
                if kind == "dot":  # the table stands there twice, so the fifth bit of the index does not matter
                    found = e.call("llvm.x86.avx512.permvar.hi.512", table.type, [table, index])
                else:
                    found = self._levels(e, table, index)
                first = (2 * part + half) * width
                yield Vector(found, order[first : first + width])

    def ordered32(self, e: Emitter, address: Value, table: object) -> list[Value]:
        vectors = [vector.value for vector in self.decode(e, address, table, "exact")]
        n = self.lanes
        zipped = [n * (i % 2) + i // 2 for i in range(2 * n)]
        found: list[Value] = []
        for even, odd in zip(vectors[::2], vectors[1::2], strict=True):
            found += [e.shuffle(even, odd, zipped[:n]), e.shuffle(even, odd, zipped[n:])]
        return found

    def ordered16(self, e: Emitter, address: Value, first: Value, second: Value) -> list[Value]:
        found: list[Value] = []
        for half, products in enumerate((first, second)):
            if self._permutes:
                found.append(self._permuted16(e, address + 16 * half, e.bits(products, Type("i16", 32))))
                continue
            table = e.buffer(I32, 16)
            e.store(products, table)
            for start in range(16 * half, 16 * half + 16, self.lanes):
                codes = e.convert("zext", e.load(Type("i8", self.lanes), address + start), "i32")
                even = self._scalar_lookup(e, table, codes >> 4, I32)
                odd = self._scalar_lookup(e, table, codes & 15, I32)
                found.append(e.bits((even >> 16) | (odd & 0xFFFF0000), Type("i16", 2 * self.lanes)))
        return found

    def _permuted16(self, e: Emitter, address: Value, table: Value) -> Value:
        """16 packed bytes as 32 values: entry ``2 * code + 1`` of the table, the high half of a 32-bit product."""
        packed = e.shuffle(e.load(Type("i8", 16), address), None, [i % 16 for i in range(64)])
        # A byte goes low into the lane of its high nibble, and high into that of its low one. Shifted right by 3 or
        # 7, the nibble stands one bit up in either; what is above it the permute ignores.
        places = [byte for pair in range(16) for byte in (pair, 0x80, 0x80, pair)]
        control = e.const(Type("i8", 64), places)
        spread = e.bits(e.call("llvm.x86.avx512.pshuf.b.512", packed.type, [packed, control]), table.type)
        index = (spread >> e.const(table.type, [3, 7] * 16)) | 1
        return e.call("llvm.x86.avx512.permvar.hi.512", table.type, [table, index])

    def tree(self, e: Emitter, address: Value) -> object:
        return self.table(e, address, "exact")

    def node(self, e: Emitter, tree: object, index: Value, depth: int) -> Value:
        return self._levels(e, tree, index)

    def wide_table(self, e: Emitter, address: Value, elem: str) -> object:
        if not self._permutes:
            return address
        return [e.load(Type(elem, 16), address + 64 * half) for half in range(2)]

    def lookup_wide(self, e: Emitter, table: object, index: Value, elem: str) -> Value:
        if not self._permutes:
            assert isinstance(table, Value)
            return self._scalar_lookup(e, table, index & 31, Type(elem))
        assert isinstance(table, list)
        name = f"llvm.x86.avx512.vpermi2var.{'ps' if elem == 'float' else 'd'}.512"
        return e.call(name, index.type.of(elem), [table[0], index, table[1]])

    def shuffle_bytes(self, e: Emitter, table: Value, codes: Value) -> Value:
        if self._permutes and codes.type.lanes == 64:
            return e.call("llvm.x86.avx512.pshuf.b.512", codes.type, [_spread(e, table, 64), codes])
        if self._permutes:
            wide = e.shuffle(codes, None, [i % codes.type.lanes for i in range(64)])
            return e.shuffle(self.shuffle_bytes(e, table, wide), None, range(codes.type.lanes))
        address = e.buffer(I8, 16)
        e.store(table, address)
        found = e.undef(codes.type)
        for lane in range(codes.type.lanes):
            offset = e.convert("zext", e.extract(codes, lane), "i64")
            found = e.insert(found, e.load(I8, address + offset), lane)
        return found


@dataclass(frozen=True)
class PlaneLevel(Level):
    """Codes as bytes, values as byte planes."""

    def kind(self, dtype: str) -> str:
        return "coarse" if dtype == "bf16" else "exact"

    def shuffle_bytes(self, e: Emitter, table: Value, codes: Value) -> Value:
        return self._shuffle(e, _spread(e, table, self.register_bytes), codes)

    def _shuffle(self, e: Emitter, plane: Value, codes: Value) -> Value:
        name = "llvm.aarch64.neon.tbl1.v16i8" if self.machine == "aarch64" else "llvm.x86.avx2.pshuf.b"
        return e.call(name, codes.type, [plane, codes])

    def table(self, e: Emitter, address: Value, kind: str) -> object:
        count, start = (2, TABLE_COARSE_PLANES) if kind == "coarse" else (4, TABLE_EXACT_PLANES)
        return [
            _spread(e, e.load(Type("i8", 16), address + (start + 16 * plane)), self.register_bytes)
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

    def tree(self, e: Emitter, address: Value) -> object:
        if self.machine == "aarch64":
            return [e.load(Type("i8", 16), address + 16 * part) for part in range(4)]
        return [e.load(Type("float", 8), address + 32 * part) for part in range(2)]

    def node(self, e: Emitter, tree: object, index: Value, depth: int) -> Value:
        assert isinstance(tree, list)
        if self.machine == "aarch64":
            offsets = e.bits(index * 0x04040404 + 0x03020100, Type("i8", 16))
            found = e.call("llvm.aarch64.neon.tbl4.v16i8", offsets.type, [*tree, offsets])
            return e.bits(found, index.type.of("float"))
        # reads the three low bits of the index only
        return e.call("llvm.x86.avx2.permps", index.type.of("float"), [tree[depth == 3], index])


_V3 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}

LEVELS: tuple[Level, ...] = (
    LaneLevel(
        "avx512bf16", "x86_64", "x86-64-v4", "+avx512bf16", _V4 | {"avx512bf16"}, 16, dot_bf16=True, wide_lookup=True
    ),
    LaneLevel("avx512", "x86_64", "x86-64-v4", "", _V4, 16, wide_lookup=True),
    PlaneLevel("avx2", "x86_64", "x86-64-v3", "", _V3, 8),
    PlaneLevel("neon", "aarch64", "generic", "+neon", frozenset(), 4),
    LaneLevel("portable", "", "", "", frozenset(), 4, half_native=False, wide_lookup=True),
)
"""Best first."""
