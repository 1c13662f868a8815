"""AVX-512 and AMX on a machine that has neither: their instructions written as plain IR, one meaning each.

The kernels' own text is run, all but the instructions themselves: index arithmetic, loops, layouts, tails.
"""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.ssa import F32, I8, I32, I64, Type, Value

TILE_BYTES, ROWS, ROW_BYTES = 1024, 16, 64


class EmulatedEmitter(Emitter):
    """Writes what an instruction does instead of its name."""

    def call(self, name: str, type_: Type, arguments: Sequence[Value], flags: str = "") -> Value:
        if not name.startswith("llvm.x86."):
            return super().call(name, type_, arguments, flags)
        return {
            "avx512.permvar.hi.512": lambda: self._entries(arguments[0], arguments[1]),
            "avx512.permvar.sf.512": lambda: self._entries(arguments[0], arguments[1]),
            "avx512.vpermi2var.ps.512": lambda: self._two_tables(arguments),
            "avx512.vpermi2var.d.512": lambda: self._two_tables(arguments),
            "avx512.pshuf.b.512": lambda: self._shuffled_bytes(*arguments),
            "avx512.mask.gather.dpi.512": lambda: self._gathered(arguments[1], arguments[2]),
            "avx512bf16.cvtne2ps2bf16.512": lambda: self._rounded_pairs(type_, arguments),
            "avx512bf16.dpbf16ps.512": lambda: self._summed_pairs(*arguments),
        }[name.removeprefix("llvm.x86.")]()

    def effect(self, name: str, arguments: Sequence[Value]) -> None:
        instruction = name.removeprefix("llvm.x86.")
        if instruction == "ldtilecfg":
            self._tiles = self.buffer(F32, 8 * TILE_BYTES // 4)
        elif instruction == "tilezero":
            with self.loop(0, TILE_BYTES, ROW_BYTES) as row:
                self.store(self.const(Type("float", 16), 0.0), self._tile(arguments[0]) + row)
        elif instruction in {"tileloadd64", "tilestored64"}:
            memory = self.emit(I64, f"ptrtoint {arguments[1].type} {arguments[1].name} to i64")
            ends = (memory, self._tile(arguments[0]))
            start, to = ends if instruction == "tileloadd64" else ends[::-1]
            with self.loop(0, TILE_BYTES, ROW_BYTES) as row:
                self.store(self.load(Type("i32", 16), start + row), to + row)
        elif instruction == "tdpbf16ps":
            self._multiplied(*map(self._tile, arguments))
        else:
            assert instruction == "tilerelease"

    def _tile(self, number: Value) -> Value:
        return self._tiles + TILE_BYTES * int(number.name)

    def _multiplied(self, sums: Value, left: Value, right: Value) -> None:
        with self.loop(0, ROWS) as row, self.loop(0, 16) as pair:
            place = sums + row * ROW_BYTES
            one = self.splat(self.load(I32, left + row * ROW_BYTES + pair * 4), 16)
            others = self.load(Type("i32", 16), right + pair * ROW_BYTES)
            self.store(self._summed_pairs(self.load(Type("float", 16), place), one, others), place)

    def _summed_pairs(self, total: Value, left: Value, right: Value) -> Value:
        for upper in (False, True):
            total = total + self._half(left, upper) * self._half(right, upper)
        return total

    def _half(self, pairs: Value, upper: bool) -> Value:
        words = self.bits(pairs, Type("i32", 16))
        return self.bits(words & 0xFFFF0000 if upper else words << 16, Type("float", 16))

    def _rounded_pairs(self, type_: Type, halves: Sequence[Value]) -> Value:
        """The second argument fills the lower half."""
        found: list[Value] = []
        for half in reversed(halves):
            bits = self.bits(half, Type("i32", 16))
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = self.select(self.compare("uno", half, half), self.const(bits.type, 0x7FC0), rounded)
            found.append(self.convert("trunc", rounded, "i16"))
        return self.bits(self.concat(found), type_)

    def _entries(self, table: Value, index: Value) -> Value:
        """As many low bits of each index as the table has entries."""
        found = self.undef(Type(table.type.elem, index.type.lanes))
        for lane in range(index.type.lanes):
            place = self.convert("zext", self.extract(index, lane) & (table.type.lanes - 1), "i32")
            entry = f"extractelement {table.type} {table.name}, i32 {place.name}"
            found = self.insert(found, self.emit(Type(table.type.elem), entry), lane)
        return found

    def _two_tables(self, arguments: Sequence[Value]) -> Value:
        return self._entries(self.concat([arguments[0], arguments[2]]), arguments[1])

    def _shuffled_bytes(self, table: Value, control: Value) -> Value:
        """Within 16 bytes each; zero where the control's sign bit is set."""
        found = self.undef(table.type)
        for lane in range(64):
            wanted = self.extract(control, lane)
            place = self.convert("zext", (wanted & 15) + (lane & 48), "i32")
            entry = self.emit(I8, f"extractelement {table.type} {table.name}, i32 {place.name}")
            entry = self.select(self.compare("slt", wanted, 0), self.const(I8, 0), entry)
            found = self.insert(found, entry, lane)
        return found

    def _gathered(self, pointer: Value, index: Value) -> Value:
        start = self.emit(I64, f"ptrtoint {pointer.type} {pointer.name} to i64")
        found = self.undef(index.type)
        for lane in range(16):
            offset = self.convert("sext", self.extract(index, lane), "i64") << 2
            found = self.insert(found, self.load(I32, start + offset), lane)
        return found
