"""Products on a matrix unit (AMX): weights are decoded tile by tile into the cache, and meet every activation there."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.level import CHUNK, CHUNK_BYTES, TABLE_EXACT, Level
from halfbyte.backends.cpu.kernels.ssa import I64, Type, Value
from halfbyte.backends.cpu.kernels.values import ITEMSIZE, Scales, load_float, store_float

__all__ = ["ARGUMENTS", "PREPARE_ARGUMENTS", "SIDE", "emit", "emit_prepare", "ordered_bytes", "workspace_bytes"]

ARGUMENTS = (
    "packed",
    "source",
    "stride",
    "out",
    "bias",
    "tables",
    *Scales.ARGUMENTS,
    "block_shift",
    "rows",
    "chunks",
    "batch",
    "groups",
    "panel",
    "rows_a_piece",
    "workspace",
    "workspace_stride",
    "ahead",
    "thread",
)
"""``source``: activations, ``stride`` bytes from row to row; of several groups, what :func:`emit_prepare` made of
them. ``groups``: of ``wide`` tiles of activations. ``panel``: chunks of a row that are decoded at a time.
``workspace``: ``workspace_stride`` bytes of memory a thread. ``ahead``: bytes from what is decoded to what is fetched.
``thread``: 0, from which threads are counted."""

PREPARE_ARGUMENTS = ("source", "out", "stride", "chunks", "batch", "chunks_a_piece", "pieces_a_tile")
"""``stride``: bytes between rows of activations."""

SIDE = 16
"""Rows of a tile; each has 16 fp32 or 16 pairs of bf16."""

TILE_BYTES = 1024
STEPS = 2
"""Tiles that a chunk is wide: 32 values each."""


def ordered_bytes(tiles: int, chunks: int) -> int:
    """Of that many tiles of activations in the order of the product."""
    return tiles * chunks * STEPS * TILE_BYTES


def workspace_bytes(wide: int, groups: int, panel: int, tiles: int, chunks: int) -> int:
    """Of one thread that works on ``tiles`` tiles of rows at a time: activations if there is one group of them, sums, a
    turned tile, a decoded panel."""
    own = ordered_bytes(wide, chunks) if groups == 1 else 0
    return own + (tiles * groups * wide + 1 + tiles * panel * STEPS) * TILE_BYTES


def emit_prepare(e: Emitter, level: Level) -> None:
    """Write the kernel that puts bf16 activations into tiles: ``[tile][chunk][step][16 pairs][16 rows]``."""
    source, out, stride, chunks, batch, a_piece, per_tile = (e.argument(name) for name in PREPARE_ARGUMENTS)
    with e.pieces() as piece:
        tile = piece / per_tile
        first = (piece - tile * per_tile) * a_piece
        last = e.least(first + a_piece, chunks)
        rows = [e.least(tile * SIDE + row, batch - 1) for row in range(SIDE)]
        _order(e, level, source, stride, rows, first, last, out + tile * chunks * (STEPS * TILE_BYTES))


def _order(
    e: Emitter, level: Level, source: Value, stride: Value, rows: list[Value], first: Value, last: Value, to: Value
) -> None:
    """Put the chunks from ``first`` to ``last`` of a tile's rows into order.

    Pairs are those that :meth:`Level.decode` puts beside each other. Rows beyond the last repeat it.
    """
    order = level.order("dot")
    addresses = [source + row * stride for row in rows]
    with e.loop(first, last) as chunk:
        found = [e.load(Type("i16", CHUNK), row + chunk * (2 * CHUNK)) for row in addresses]
        place = to + chunk * (STEPS * TILE_BYTES)
        for step in range(STEPS):
            elements = order[step * 32 : step * 32 + 32]
            lines = [e.bits(e.shuffle(values, None, elements), Type("i32", SIDE)) for values in found]
            for pair, line in enumerate(_transposed(e, lines)):
                e.store(line, place + (step * TILE_BYTES + 64 * pair))


def _transposed(e: Emitter, lines: Sequence[Value]) -> list[Value]:
    """A square of vectors turned over its diagonal, in four rounds of exchanges."""
    found, size = list(lines), len(lines)
    width = 1
    while width < size:
        left = [lane if not lane & width else size + lane - width for lane in range(size)]
        right = [lane + width if not lane & width else size + lane for lane in range(size)]
        for i in range(size):
            if not i & width:
                a, b = found[i], found[i + width]
                found[i], found[i + width] = e.shuffle(a, b, left), e.shuffle(a, b, right)
        width *= 2
    return found


def emit(
    e: Emitter,
    level: Level,
    *,
    nested: bool,
    halves: bool,
    high: int,
    wide: int,
    whole: bool,
) -> None:
    """Write the kernel for bf16 activations.

    Args:
        nested: absmax is double-quantized.
        halves: Blocks have 32 values, so that a chunk is two blocks; else 64 or more.
        high: Tiles of rows of the weight multiplied at a time.
        wide: Tiles of activations multiplied at a time.
        whole: There is one group of activations: sums stay in tiles from the first panel to the last, and each thread
            puts the activations into order for itself, which takes less time than a call for all of them.
    """
    _Product(e, level, nested, halves, high, wide, whole).emit()


class _Product:
    def __init__(
        self,
        e: Emitter,
        level: Level,
        nested: bool,
        halves: bool,
        high: int,
        wide: int,
        whole: bool,
    ) -> None:
        self.e, self.level, self.halves, self.high, self.wide, self.whole = e, level, halves, high, wide, whole
        self.packed, self.out, self.bias = (e.argument(n) for n in ("packed", "out", "bias"))
        self.block_shift, self.rows, self.chunks = (e.argument(n) for n in ("block_shift", "rows", "chunks"))
        self.batch, self.groups, self.panel = (e.argument(n) for n in ("batch", "groups", "panel"))
        self.rows_a_piece = e.argument("rows_a_piece")
        self.scales = Scales(e, nested)
        self.levels = e.load(Type("float", SIDE), e.argument("tables") + TABLE_EXACT)
        mine = e.argument("workspace") + e.ticket("thread") * e.argument("workspace_stride")
        self.x = mine if whole else e.argument("source")
        self.sums = mine + self.chunks * (wide * STEPS * TILE_BYTES) if whole else mine
        tiles = self.rows_a_piece / SIDE if not whole else e.const(I64, high)
        self.turned = self.sums + tiles * self.groups * (wide * TILE_BYTES)
        self.ahead = e.argument("ahead")
        self.decoded = self.turned + TILE_BYTES
        self.tile_bytes = self.panel * (STEPS * TILE_BYTES)  # of a tile of rows in a panel

    def emit(self) -> None:
        e = self.e
        if self.whole:
            self.order()
        self.level.tiles_begin(e)
        with e.pieces(after=lambda: self.level.tiles_end(e)) as piece:
            start = piece * self.rows_a_piece
            stop = e.least(start + self.rows_a_piece, self.rows)
            if self.whole:
                with e.loop(start, stop, SIDE * self.high) as row:
                    self.group(row, e.least(row + SIDE * self.high, stop))
            else:
                self.group(start, stop)

    def order(self) -> None:
        """Put the activations into order."""
        e, source, stride = self.e, self.e.argument("source"), self.e.argument("stride")
        for tile in range(self.wide):
            rows = [e.least(e.const(I64, tile * SIDE + row), self.batch - 1) for row in range(SIDE)]
            to = self.x + self.chunks * (tile * STEPS * TILE_BYTES)
            _order(e, self.level, source, stride, rows, e.const(I64, 0), self.chunks, to)

    def group(self, start: Value, stop: Value) -> None:
        """Rows ``start`` to ``stop`` times all activations."""
        e = self.e
        blocks = (stop - start + (SIDE * self.high - 1)) / (SIDE * self.high)
        if self.whole:
            self.clear()
        else:
            with e.loop(0, blocks * self.groups * (self.high * self.wide * TILE_BYTES), 64) as place:
                e.store(e.const(Type("float", SIDE), 0.0), self.sums + place)
        with e.loop(0, self.chunks, self.panel) as first:
            last = e.least(first + self.panel, self.chunks)
            with e.loop(0, blocks * self.high) as tile:
                self.decode(start + tile * SIDE, first, last, self.decoded + tile * self.tile_bytes)
            if self.whole:
                self.multiply(self.decoded, self.x, first, last)
            else:
                self.add_panel(blocks, first, last)
        if self.whole:
            self.move(self.level.tile_store, self.sums)
        with e.loop(0, blocks) as block, e.loop(0, self.groups) as group:
            sums = self.sums + (block * self.groups + group) * (self.high * self.wide * TILE_BYTES)
            for i in range(self.high):
                for j in range(self.wide):
                    row = start + (block * self.high + i) * SIDE
                    member = (group * self.wide + j) * SIDE
                    self.finish(sums + (i * self.wide + j) * TILE_BYTES, row, member)

    def add_panel(self, blocks: Value, first: Value, last: Value) -> None:
        """The decoded panel times every group of activations."""
        e = self.e
        with e.loop(0, blocks) as block, e.loop(0, self.groups) as group:
            sums = self.sums + (block * self.groups + group) * (self.high * self.wide * TILE_BYTES)
            self.move(self.level.tile_load, sums)
            activations = self.x + group * self.chunks * (self.wide * STEPS * TILE_BYTES)
            self.multiply(self.decoded + block * self.high * self.tile_bytes, activations, first, last)
            self.move(self.level.tile_store, sums)

    def clear(self) -> None:
        for tile in range(self.high * self.wide):
            self.level.tile_zero(self.e, tile)

    def move(self, how: object, address: Value) -> None:
        """Sums from or to memory."""
        for tile in range(self.high * self.wide):
            how(self.e, tile, address + tile * TILE_BYTES)

    def decode(self, row: Value, first: Value, last: Value, to: Value) -> None:
        """The chunks of 16 rows from ``row`` on, as tiles of bf16; rows beyond the last repeat it."""
        e = self.e
        with e.loop(0, SIDE) as line:
            number = e.least(row + line, self.rows - 1) * self.chunks
            with e.loop(first, last) as chunk:
                place = to + (chunk - first) * (STEPS * TILE_BYTES) + (line << 6)
                for step, values in enumerate(self.values(number + chunk)):
                    e.store(values, place + step * TILE_BYTES)

    def values(self, chunk: Value) -> list[Value]:
        e = self.e
        address = self.packed + chunk * CHUNK_BYTES
        e.prefetch(address + self.ahead)
        if self.halves:
            scales = [self.scales.at(chunk << 1), self.scales.at((chunk << 1) + 1)]
        else:
            scales = [self.scales.at(chunk >> self.block_shift)]
        products = [self.levels * e.splat(scale, SIDE) for scale in scales]
        table = self.level.pair_table(e, products[0], products[-1])
        return [v.value for v in self.level.decode(e, address, table, "halves" if self.halves else "dot")]

    def multiply(self, weights: Value, x: Value, first: Value, last: Value) -> None:
        """Add the products of the decoded panel with a group of activations to the sums in tiles."""
        e, level = self.e, self.level
        left = self.high * self.wide
        right = left + self.high
        stride = self.chunks * (STEPS * TILE_BYTES)
        with e.loop(first * STEPS, last * STEPS) as step:
            at = weights + (step - first * STEPS) * TILE_BYTES
            loads = [(left + i, at + self.tile_bytes * i) for i in range(self.high)]
            loads += [(right + j, x + step * TILE_BYTES + stride * j) for j in range(self.wide)]
            for tile, address in loads:
                level.tile_load(e, tile, address)
            for i in range(self.high):
                for j in range(self.wide):
                    level.tile_dot(e, i * self.wide + j, left + i, right + j)

    def finish(self, sums: Value, row: Value, member: Value) -> None:
        """One tile of sums, ``[16 rows][16 activations]``, turned, with bias, rounded and stored."""
        e = self.e
        lines = [e.load(Type("float", SIDE), sums + 64 * i) for i in range(SIDE)]
        for i, line in enumerate(_transposed(e, lines)):
            e.store(line, self.turned + 64 * i)
        last = e.least(self.batch - member, e.const(I64, SIDE))
        size = ITEMSIZE["bf16"]
        full = e.compare("sle", row + SIDE, self.rows)
        biased = e.compare("ne", self.bias, e.const(I64, 0))
        for lanes, condition in ((SIDE, full), (0, e.compare("sgt", row + SIDE, self.rows))):
            with e.when(condition), e.loop(0, last) as m:
                count = e.const(I64, 1) if lanes else self.rows - row
                with e.loop(0, count) as n:
                    value = e.variable(
                        Type("float", lanes), e.load(Type("float", lanes), self.turned + (m << 6) + (n << 2))
                    )
                    with e.when(biased):
                        added = load_float(e, self.level, self.bias + (row + n) * size, "bf16", lanes)
                        value.set(value.get() + added)
                    to = self.out + ((member + m) * self.rows + row + n) * size
                    store_float(e, self.level, value.get(), to, "bf16")
