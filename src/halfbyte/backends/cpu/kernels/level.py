"""What a CPU level is: lanes, compiler target, and how 16 values are looked up; the algorithms are elsewhere.

A *chunk* is 32 packed bytes, 64 codes: every level works on whole chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.ssa import I32, Value

__all__ = [
    "CHUNK",
    "CHUNK_BYTES",
    "TABLE_BYTES",
    "TABLE_COARSE",
    "TABLE_COARSE_PLANES",
    "TABLE_EXACT",
    "TABLE_EXACT_PLANES",
    "Level",
    "Vector",
    "spread",
]

CHUNK = 64
CHUNK_BYTES = CHUNK // 2

TABLE_EXACT, TABLE_EXACT_PLANES, TABLE_COARSE, TABLE_COARSE_PLANES, TABLE_BYTES = 0, 64, 128, 160, 192
"""Where a codebook's lookup block holds 16 fp32, their 4 byte planes, 16 bf16, their 2 byte planes; its size."""


@dataclass(frozen=True)
class Vector:
    """A vector of values and, lane by lane, which of the chunk's 64 elements they are."""

    value: Value
    elements: tuple[int, ...]


@dataclass(frozen=True, eq=False)
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
        matrix: There is a unit that multiplies tiles of bf16.
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
    matrix: bool = False

    @property
    def wide_rows(self) -> bool:
        """Whether it takes 64 bytes of codes at a time, as :meth:`decode_wide` does."""
        return False

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

    def narrow(self, e: Emitter, words: Sequence[Value]) -> Value:
        """Vectors of i32 from 0 to 255 in a row, as bytes."""
        return e.convert("trunc", e.concat(words), "i8")

    def gather(self, e: Emitter, address: Value, index: Value) -> Value:
        """The i32 at ``address`` that each lane of ``index`` counts to."""
        found = e.undef(index.type)
        for lane in range(index.type.lanes):
            offset = e.convert("sext", e.extract(index, lane), "i64") << 2
            found = e.insert(found, e.load(I32, address + offset), lane)
        return found

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

    def wide_order(self, pairs: bool) -> tuple[int, ...]:
        """The order in which :meth:`decode_wide` hands out its 128 elements."""
        raise NotImplementedError

    def decode_wide(self, e: Emitter, address: Value, table: object, pairs: bool, inside: bool) -> Iterator[Value]:
        """64 packed bytes as levels: bf16 for pairs, else fp32; ``inside`` reads no byte beyond. With ``wide_rows``."""
        raise NotImplementedError

    def pair_table(self, e: Emitter, first: Value, second: Value) -> Value:
        """The table for :meth:`decode` with bf16 levels out of two of 16 fp32, one for each half of a chunk."""
        raise NotImplementedError

    def tiles_begin(self, e: Emitter) -> None:
        """Before the first tile: eight tiles of 16 rows of 64 bytes. Tiles 0 to 7; ``matrix`` only, like the rest."""
        raise NotImplementedError

    def tiles_end(self, e: Emitter) -> None:
        """After the last tile."""
        raise NotImplementedError

    def tile_zero(self, e: Emitter, tile: int) -> None:
        """Fill with zeros."""
        raise NotImplementedError

    def tile_load(self, e: Emitter, tile: int, address: Value) -> None:
        """Load 1 KiB."""
        raise NotImplementedError

    def tile_store(self, e: Emitter, tile: int, address: Value) -> None:
        """Store 1 KiB."""
        raise NotImplementedError

    def tile_dot(self, e: Emitter, sums: int, left: int, right: int) -> None:
        """Add to ``sums[i][j]`` in fp32 the products of 16 bf16 pairs ``left[i][p]`` with ``right[p][j]``."""
        raise NotImplementedError

    def lookup_bytes(self, e: Emitter, table: Value, codes: Value) -> Value:
        """``table[code]`` for any power-of-two number of codes below 16."""
        size = min(self.register_bytes, codes.type.lanes)
        parts = [
            self.shuffle_bytes(e, table, e.shuffle(codes, None, range(start, start + size)))
            for start in range(0, codes.type.lanes, size)
        ]
        return e.concat(parts)


def spread(e: Emitter, table: Value, size: int) -> Value:
    return e.shuffle(table, None, [i % 16 for i in range(size)])
