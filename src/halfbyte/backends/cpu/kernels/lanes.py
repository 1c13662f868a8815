"""Levels that keep a code in each lane: one permute reads the table (AVX-512), or scalar loads do (portable)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.level import CHUNK, CHUNK_BYTES, TABLE_COARSE, Level, Vector, spread
from halfbyte.backends.cpu.kernels.ssa import F32, I8, I32, I64, Type, Value

__all__ = ["LaneLevel"]


@dataclass(frozen=True, eq=False)
class LaneLevel(Level):
    """A code in each 32-bit lane."""

    def kind(self, dtype: str) -> str:
        return "dot" if dtype == "bf16" and self.dot_bf16 else "exact"

    @property
    def wide_rows(self) -> bool:
        return self._permutes

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
        width = CHUNK_BYTES if kind in {"dot", "halves"} else self.lanes
        found: list[int] = []
        for start in range(0, CHUNK, 2 * width):
            found += [*range(start, start + 2 * width, 2), *range(start + 1, start + 2 * width, 2)]
        return tuple(found)

    def decode(self, e: Emitter, address: Value, table: object, kind: str) -> Iterator[Vector]:
        assert isinstance(table, Value)
        pairs = kind in {"dot", "halves"}
        order, width = self.order(kind), CHUNK_BYTES if pairs else self.lanes
        halves = e.const(Type("i16", CHUNK_BYTES), [0] * 16 + [16] * 16)
        for part, start in enumerate(range(0, CHUNK_BYTES, width)):
            codes = e.convert("zext", e.load(Type("i8", width), address + start), "i16" if pairs else "i32")
            for half, index in enumerate((codes >> 4, codes)):
                if pairs:  # the table stands there twice, so the fifth bit of the index does not matter
                    index = index if kind == "dot" else (index & 15) | halves
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

    def gather(self, e: Emitter, address: Value, index: Value) -> Value:
        if not self._permutes:
            return super().gather(e, address, index)
        every = e.const(Type("i1", 16), 1)
        arguments = [e.undef(index.type), e.as_pointer(address), index, every, e.const(I32, 4)]
        return e.call("llvm.x86.avx512.mask.gather.dpi.512", index.type, arguments)

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
            return e.call("llvm.x86.avx512.pshuf.b.512", codes.type, [spread(e, table, 64), codes])
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

    def wide_order(self, pairs: bool) -> tuple[int, ...]:
        """The order in which :meth:`decode_wide` hands out its 128 elements."""
        size = 2 if pairs else 4
        # Lane l holds bytes size * l and on; nibble j is the high one of its byte, the earlier element, if j is odd.
        return tuple(
            2 * (size * lane + nibble // 2) + (1 - nibble % 2)
            for nibble in range(2 * size)
            for lane in range(64 // size)
        )

    def decode_wide(self, e: Emitter, address: Value, table: object, pairs: bool, inside: bool) -> Iterator[Value]:
        """64 packed bytes as levels, nibble by nibble of each lane; the permute ignores what is above the nibble.

        A load that begins some bytes later does the work of a shift, of which an Intel core does only as many as of
        permutes; unless ``inside`` it reads up to three bytes more.
        """
        assert isinstance(table, Value)
        kind = Type("i16", 32) if pairs else Type("i32", 16)
        words = e.load(kind, address)
        for nibble in range(4 if pairs else 8):
            byte, high = divmod(nibble, 2)
            if not inside and byte and not high:
                words = e.load(kind, address + byte)
            count = 4 * nibble if inside else 4 * high
            index = words >> count if count else words
            if pairs:
                yield e.call("llvm.x86.avx512.permvar.hi.512", table.type, [table, index])
            else:
                yield self._levels(e, table, index)

    def pair_table(self, e: Emitter, first: Value, second: Value) -> Value:
        pairs = e.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", Type("bfloat", 32), [second, first])
        return e.bits(pairs, Type("i16", 32))

    def tiles_begin(self, e: Emitter) -> None:
        config = e.buffer(I8, 64)
        # Palette 1; eight tiles of 64 bytes a row (two bytes each, from 16 on) and 16 rows (from 48 on).
        settings = [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8]
        e.store(e.const(Type("i8", 64), settings), config)
        e.effect("llvm.x86.ldtilecfg", [e.as_pointer(config)])

    def tiles_end(self, e: Emitter) -> None:
        e.effect("llvm.x86.tilerelease", [])

    def tile_zero(self, e: Emitter, tile: int) -> None:
        e.effect("llvm.x86.tilezero", [e.const(I8, tile)])

    def tile_load(self, e: Emitter, tile: int, address: Value) -> None:
        e.effect("llvm.x86.tileloadd64", [e.const(I8, tile), e.as_pointer(address), e.const(I64, 64)])

    def tile_store(self, e: Emitter, tile: int, address: Value) -> None:
        e.effect("llvm.x86.tilestored64", [e.const(I8, tile), e.as_pointer(address), e.const(I64, 64)])

    def tile_dot(self, e: Emitter, sums: int, left: int, right: int) -> None:
        e.effect("llvm.x86.tdpbf16ps", [e.const(I8, tile) for tile in (sums, left, right)])
