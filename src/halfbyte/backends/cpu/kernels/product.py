"""Rows of a packed 4-bit weight times a few activations: one pass over the weight, nothing stored in between."""

from __future__ import annotations

from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.level import CHUNK, CHUNK_BYTES, Level
from halfbyte.backends.cpu.kernels.ssa import F32, I64, Type, Value
from halfbyte.backends.cpu.kernels.values import ITEMSIZE, Scales, load_float, store_float

__all__ = ["ARGUMENTS", "PREPARE_ARGUMENTS", "emit", "emit_prepare"]

ARGUMENTS = (
    "packed",
    "x",
    "out",
    "bias",
    "tables",
    *Scales.ARGUMENTS,
    "block_shift",
    "rows",
    "chunks",
    "batch",
    "tiles",
    "panel",
    "rows_a_piece",
)
"""``block_shift``: log2 of chunks per block. ``chunks``: of one row of the weight. ``batch``: activations.
``panel``: chunks of a row worked on at a time, so that a tile of activations stays in the first-level cache."""

PREPARE_ARGUMENTS = ("source", "out", "stride", "chunks")
"""``stride``: bytes between rows of activations."""

PREFETCH = 2048
"""Bytes ahead of what is read where a row is read at once: rows follow each other, so this is one linear stream."""

ROWS = 16
"""Rows that share a panel of activations; read panel by panel, they are prefetched one such group ahead."""


def emit_prepare(e: Emitter, level: Level, *, dtype: str, tile: int) -> None:
    """Write the kernel that puts activations into the order in which the level decodes weights.

    Row ``m`` is piece ``m``. The result is ``[tile of rows][chunk][row in tile][64]`` in fp32, or bf16 for dot.
    """
    kind = level.kind(dtype)
    size = 2 if kind == "dot" else 4
    source, out, stride, chunks = (e.argument(name) for name in PREPARE_ARGUMENTS)
    with e.pieces() as row:
        begin = source + row * stride
        base = out + ((row / tile) * chunks * tile + (row - (row / tile) * tile)) * (CHUNK * size)
        with e.loop(0, chunks) as chunk:
            to, start = base + chunk * (tile * CHUNK * size), begin + chunk * (CHUNK * ITEMSIZE[dtype])
            for place, element in enumerate(level.order(kind)):
                at = start + element * ITEMSIZE[dtype]
                value = e.load(Type("i16"), at) if kind == "dot" else load_float(e, level, at, dtype)
                e.store(value, to + place * size)


def emit(e: Emitter, level: Level, *, dtype: str, nested: bool, halves: bool, tile: int) -> None:
    """Write the kernel.

    Args:
        dtype: Of activations, bias and output.
        nested: absmax is double-quantized.
        halves: Blocks have 32 values, so that a chunk is two blocks; else 64 or more.
        tile: Activations multiplied with a chunk while it is in registers.
    """
    _Product(e, level, dtype, nested, halves, tile).emit()


class _Product:
    def __init__(self, e: Emitter, level: Level, dtype: str, nested: bool, halves: bool, tile: int) -> None:
        self.e, self.level, self.dtype, self.halves, self.tile = e, level, dtype, halves, tile
        self.kind = level.kind(dtype)
        self.size = 2 if self.kind == "dot" else 4
        self.vector = Type("float", level.lanes)
        for name in ("packed", "x", "out", "bias", "block_shift", "rows", "chunks", "batch", "tiles", "panel"):
            setattr(self, name, e.argument(name))
        self.rows_a_piece = e.argument("rows_a_piece")
        self.scales = Scales(e, nested)
        self.table = level.table(e, e.argument("tables"), self.kind)
        self.partial = e.buffer(F32, ROWS * tile * level.lanes)

    def emit(self) -> None:
        e = self.e
        with e.pieces() as piece:
            start = piece * self.rows_a_piece
            stop = self.e.least(start + self.rows_a_piece, self.rows)
            if self.tile == 1:
                with e.loop(start, stop) as row:
                    zeros = [e.const(self.vector, 0.0)]
                    sums = self.dot(row, e.const(I64, 0), self.chunks, self.x, e.const(I64, PREFETCH), zeros)
                    self.finish(row, e.const(I64, 0), e.total(sums[0]))
                return
            with e.loop(start, stop, ROWS) as group, e.loop(0, self.tiles) as tile:
                self.group(group, self.e.least(group + ROWS, stop), tile)

    def group(self, start: Value, stop: Value, tile: Value) -> None:
        """Some rows times one tile of activations, panel by panel."""
        e = self.e
        x = self.x + tile * self.chunks * (self.tile * CHUNK * self.size)
        row_bytes = self.tile * self.vector.lanes * 4
        with e.loop(0, (stop - start) * (row_bytes // 4), self.vector.lanes) as place:
            e.store(e.const(self.vector, 0.0), self.partial + (place << 2))
        ahead = self.chunks * (ROWS * CHUNK_BYTES)
        with e.loop(0, self.chunks, self.panel) as first:
            last = self.e.least(first + self.panel, self.chunks)
            with e.loop(start, stop) as row:
                place = self.partial + (row - start) * row_bytes
                slots = [place + i * self.vector.lanes * 4 for i in range(self.tile)]
                sums = self.dot(row, first, last, x, ahead, [e.load(self.vector, slot) for slot in slots])
                for total, slot in zip(sums, slots, strict=True):
                    e.store(total, slot)
        with e.loop(start, stop) as row:
            for i in range(self.tile):
                member = tile * self.tile + i
                with e.when(e.compare("slt", member, self.batch)):
                    slot = self.partial + (row - start) * row_bytes + i * self.vector.lanes * 4
                    self.finish(row, member, e.total(e.load(self.vector, slot)))

    def dot(self, row: Value, first: Value, last: Value, x: Value, ahead: Value, before: list[Value]) -> list[Value]:
        """``before`` plus the products of a row's chunks ``first`` to ``last`` with the activations at ``x``."""
        e = self.e
        sums = [e.variable(self.vector, value) for value in before]
        packed = self.packed + row * self.chunks * CHUNK_BYTES
        with e.loop(first, last) as chunk:
            address = packed + chunk * CHUNK_BYTES
            e.prefetch(address + ahead)
            parts = self.dot_chunk(address, x + chunk * (self.tile * CHUNK * self.size))
            scales = self.chunk_scales(row * self.chunks + chunk)
            for sides, products in parts.items():
                scale = self.spread(sides, scales)
                for variable, product in zip(sums, products, strict=True):
                    variable.set(e.fma(product, scale, variable.get()))
        return [variable.get() for variable in sums]

    def dot_chunk(self, address: Value, x: Value) -> dict[tuple[bool, ...], list[Value]]:
        """Unscaled products of the chunk with each activation, by which half of the chunk each lane belongs to."""
        e, found = self.e, {}
        place = 0
        for levels in self.level.decode(e, address, self.table, self.kind):
            per = len(levels.elements) // self.level.lanes
            sides = tuple(self.halves and element >= CHUNK // 2 for element in levels.elements[::per])
            known = found.get(sides)
            made: list[Value] = []
            for member in range(self.tile):
                values = e.load(levels.value.type, x + (member * CHUNK + place) * self.size)
                made.append(self.multiply(levels.value, values, known[member] if known else None))
            found[sides] = made
            place += len(levels.elements)
        return found

    def multiply(self, levels: Value, values: Value, total: Value | None) -> Value:
        e = self.e
        if self.kind == "dot":
            pairs = Type("bfloat", levels.type.lanes)
            total = total if total is not None else e.const(self.vector, 0.0)
            arguments = [total, e.bits(levels, pairs), e.bits(values, pairs)]
            return e.call("llvm.x86.avx512bf16.dpbf16ps.512", self.vector, arguments)
        return levels * values if total is None else e.fma(levels, values, total)

    def chunk_scales(self, chunk: Value) -> list[Value]:
        if self.halves:
            return [self.scales.at(chunk << 1), self.scales.at((chunk << 1) + 1)]
        return [self.scales.at(chunk >> self.block_shift)]

    def spread(self, sides: tuple[bool, ...], scales: list[Value]) -> Value:
        e, lanes = self.e, self.level.lanes
        if len(set(sides)) == 1:
            return e.splat(scales[sides[0]], lanes)
        both = [e.splat(scale, lanes) for scale in scales]
        return e.shuffle(both[0], both[1], [lane + lanes * side for lane, side in enumerate(sides)])

    def finish(self, row: Value, member: Value, total: Value) -> None:
        """Add the bias, round and store one product."""
        e = self.e
        result = e.variable(F32, total)
        with e.when(e.compare("ne", self.bias, e.const(I64, 0))):
            bias = load_float(e, self.level, self.bias + row * ITEMSIZE[self.dtype], self.dtype)
            result.set(result.get() + bias)
        to = self.out + (member * self.rows + row) * ITEMSIZE[self.dtype]
        store_float(e, self.level, result.get(), to, self.dtype)
