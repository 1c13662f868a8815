"""Rows of a packed 4-bit weight times very few activations: several rows at a time, 128 codes in one register."""

from __future__ import annotations

from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.level import CHUNK, CHUNK_BYTES, Level
from halfbyte.backends.cpu.kernels.ssa import F32, I64, Type, Value, Variable
from halfbyte.backends.cpu.kernels.values import ITEMSIZE, Scales, load_float, store_float

__all__ = ["ARGUMENTS", "WIDE", "emit"]

ARGUMENTS = (
    "packed",
    "source",
    "stride",
    "ordered",
    "out",
    "bias",
    "tables",
    *Scales.ARGUMENTS,
    "block_shift",
    "rows",
    "groups",
    "batch",
    "rows_a_piece",
    "ahead",
    "ordered_bytes",
    "thread",
)
"""``source``, ``stride``: activations, bytes between their rows. ``ordered``: ``ordered_bytes`` of memory a thread.
``block_shift``: log2 of groups of 128 per block. ``groups``: of one row. ``ahead``: bytes from what is read to what is
fetched. ``thread``: 0, from which threads are counted."""

WIDE = 2 * CHUNK
"""Codes that are read at once: 64 bytes."""


def emit(
    e: Emitter, level: Level, *, dtype: str, nested: bool, blocks: int, pairs: bool, together: int, tile: int
) -> None:
    """Write the kernel.

    Args:
        dtype: Of activations, bias and output.
        nested: absmax is double-quantized.
        blocks: That 128 codes belong to: 1, 2 or 4.
        pairs: Multiply levels rounded to bf16, in pairs; else exact ones in fp32.
        together: Rows worked on at a time.
        tile: Activations.
    """
    _Product(e, level, dtype, nested, blocks, pairs, together, tile).emit()


class _Product:
    def __init__(
        self, e: Emitter, level: Level, dtype: str, nested: bool, blocks: int, pairs: bool, together: int, tile: int
    ) -> None:
        self.e, self.level, self.dtype, self.blocks, self.pairs = e, level, dtype, blocks, pairs
        self.together, self.tile = together, tile
        self.packed, self.out, self.bias = (e.argument(n) for n in ("packed", "out", "bias"))
        self.block_shift, self.rows, self.groups = (e.argument(n) for n in ("block_shift", "rows", "groups"))
        self.batch, self.rows_a_piece, self.ahead = (e.argument(n) for n in ("batch", "rows_a_piece", "ahead"))
        self.scales = Scales(e, nested)
        self.table = level.table(e, e.argument("tables"), "dot" if pairs else "exact")
        self.vector = Type("float", level.lanes)

    def emit(self) -> None:
        e = self.e
        self.x = e.argument("ordered") + e.ticket("thread") * e.argument("ordered_bytes")
        self.order(e.argument("source"), e.argument("stride"))
        with e.pieces() as piece:
            start = piece * self.rows_a_piece
            stop = self.e.least(start + self.rows_a_piece, self.rows)
            with e.loop(start, stop, self.together) as first:
                self.some_rows([self.e.least(first + i, stop - 1) for i in range(self.together)])

    def order(self, source: Value, stride: Value) -> None:
        """Put activations into the order of the weights, ``[group][row][128]`` in bf16 or fp32: each thread its own,
        which takes less time than a call for all of them."""
        e, size, itemsize = self.e, 2 if self.pairs else 4, ITEMSIZE[self.dtype]
        with e.loop(0, self.batch) as row, e.loop(0, self.groups) as group:
            to, start = self.x + (group * self.tile + row) * (WIDE * size), source + row * stride
            for place, element in enumerate(self.level.wide_order(self.pairs)):
                at = start + group * (WIDE * itemsize) + element * itemsize
                value = e.load(Type("i16"), at) if self.pairs else load_float(e, self.level, at, self.dtype)
                e.store(value, to + place * size)

    def some_rows(self, rows: list[Value]) -> None:
        e = self.e
        sums = [[e.variable(self.vector, 0.0) for _ in range(self.tile)] for _ in rows]
        numbers, last = [row * self.groups for row in rows], self.groups - 1
        with e.loop(0, last) as group:
            self.group(group, numbers, sums, inside=False)
        self.group(last, numbers, sums, inside=True)  # the weight may end there
        for row, totals in zip(rows, sums, strict=True):
            for member, total in enumerate(totals):
                self.finish(row, member, e.total(total.get()))

    def group(self, group: Value, numbers: list[Value], sums: list[list[Variable]], *, inside: bool) -> None:
        """Add one group's products of each row, whose groups count from ``numbers`` on."""
        e = self.e
        x = self.x + group * (self.tile * WIDE * (2 if self.pairs else 4))
        for number, totals in zip(numbers, sums, strict=True):
            at = number + group
            address = self.packed + at * (2 * CHUNK_BYTES)
            e.prefetch(address + self.ahead)
            scale = self.scale(at)
            for member, product in enumerate(self.products(address, x, inside)):
                totals[member].set(e.fma(product, scale, totals[member].get()))

    def products(self, address: Value, x: Value, inside: bool) -> list[Value]:
        """Unscaled sums of products of a group with each activation."""
        e, size = self.e, 2 if self.pairs else 4
        found: list[Value] = []
        for place, levels in enumerate(self.level.decode_wide(e, address, self.table, self.pairs, inside)):
            for member in range(self.tile):
                at = x + (member * WIDE + place * levels.type.lanes) * size
                values = e.load(levels.type, at)
                if not place:
                    found.append(self.multiply(levels, values, None))
                else:
                    found[member] = self.multiply(levels, values, found[member])
        return found

    def multiply(self, levels: Value, values: Value, total: Value | None) -> Value:
        e = self.e
        if self.pairs:
            kind = Type("bfloat", levels.type.lanes)
            total = total if total is not None else e.const(self.vector, 0.0)
            arguments = [total, e.bits(levels, kind), e.bits(values, kind)]
            return e.call("llvm.x86.avx512bf16.dpbf16ps.512", self.vector, arguments)
        return levels * values if total is None else e.fma(levels, values, total)

    def scale(self, group: Value) -> Value:
        """absmax of each lane's block."""
        e, lanes = self.e, self.level.lanes
        if self.blocks == 1:
            return e.splat(self.scales.at(group >> self.block_shift), lanes)
        first = group * self.blocks
        found = e.undef(Type("float", self.blocks))
        for i in range(self.blocks):
            found = e.insert(found, self.scales.at(first + i), i)
        return e.shuffle(found, None, [lane * self.blocks // lanes for lane in range(lanes)])

    def finish(self, row: Value, member: int, total: Value) -> None:
        e = self.e
        result = e.variable(F32, total)
        with e.when(e.compare("ne", self.bias, e.const(I64, 0))):
            bias = load_float(e, self.level, self.bias + row * ITEMSIZE[self.dtype], self.dtype)
            result.set(result.get() + bias)
        to = self.out + (self.rows * member + row) * ITEMSIZE[self.dtype]
        store_float(e, self.level, result.get(), to, self.dtype)
