"""LLM.int8(): rows of activations to codes, scale and list of outliers; rows of an int8 weight times those."""

from __future__ import annotations

from collections.abc import Iterator

from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.levels import Level
from halfbyte.backends.cpu.kernels.ssa import F32, I8, I16, I32, I64, Type, Value, Variable
from halfbyte.backends.cpu.kernels.values import ITEMSIZE, load_float, store_float
from halfbyte.formats.int8 import CODE_MAX, STEP, STEP_SQUARED

__all__ = ["NO_THRESHOLD", "PRODUCT_ARGUMENTS", "QUANTIZE_ARGUMENTS", "emit_product", "emit_quantize"]

QUANTIZE_ARGUMENTS = ("source", "codes", "absmax", "outliers", "counts", "stride", "columns", "threshold")
"""``stride``: bytes between rows of the source. ``threshold``: bits of an fp32, or NO_THRESHOLD. ``outliers``:
``columns`` i32 for each row, of which the first ``counts[row]`` are written."""

PRODUCT_ARGUMENTS = (
    "weight",
    "x",
    "out",
    "bias",
    "row_absmax",
    "column_absmax",
    "outliers",
    "counts",
    "source",
    "full",
    "stride",
    "columns",
    "rows",
    "batch",
    "tiles",
    "rows_a_piece",
)
"""``x``: 16-bit codes of ``tiles`` whole tiles of activations. ``bias``: fp32, or 0. ``source``: the activations, whose
rows are ``stride`` bytes apart; ``full``: the unquantized weight; both for outliers only."""

NO_THRESHOLD = 0xFFFFFFFF

_INFINITY = 0x7F800000
_TINY, _BOOST = 2.0**-100, 2.0**100
_ROUND, _ROUND_BITS = 1.5 * 2.0**23, 0x4B400000
"""Adding this to a number below 2**22 rounds it to the nearest integer, halves to even, in the low bits."""

_UNROLL = 4
_PREFETCH = 2048


def emit_quantize(e: Emitter, level: Level, *, dtype: str, width: str, split: bool) -> None:
    """Write the kernel; a row is a piece.

    Args:
        dtype: Of the source.
        width: Of the codes: ``i8``, or ``i16`` as the product wants them.
        split: There is a threshold.
    """
    _Quantize(e, level, dtype, width, split).emit()


class _Quantize:
    def __init__(self, e: Emitter, level: Level, dtype: str, width: str, split: bool) -> None:
        self.e, self.level, self.dtype, self.split = e, level, dtype, split
        self.code, self.size = Type(width), int(width[1:]) // 8
        self.source, self.codes, self.scales, self.outliers, self.counts, self.stride, self.columns, threshold = (
            e.argument(name) for name in QUANTIZE_ARGUMENTS
        )
        self.limit = e.convert("trunc", threshold, "i32")

    def emit(self) -> None:
        e = self.e
        with e.pieces() as row:
            begin = self.source + row * self.stride
            absmax = self.absmax(begin)
            e.store(absmax, self.scales + (row << 2))
            boost = e.select(e.compare("olt", absmax, _TINY), e.const(F32, _BOOST), 1.0)
            scale = e.const(F32, 1.0) / (absmax * boost) * CODE_MAX
            scale = e.select(e.compare("oeq", absmax, 0.0), e.const(F32, 0.0), scale)
            count = e.variable(I32, 0)
            lists = self.outliers + row * self.columns * 4
            for column, lanes in self.walk():
                self.encode(begin, self.codes + row * self.columns * self.size, column, lanes, boost, scale)
                if self.split:
                    self.collect(begin, column, lanes, lists, count)
            if self.split:
                e.store(count.get(), self.counts + (row << 2))

    def walk(self) -> Iterator[tuple[Value, int]]:
        """Bodies for whole registers, then for what is left of a row."""
        e, lanes = self.e, self.level.lanes
        whole = (self.columns / lanes) * lanes
        with e.loop(0, whole, lanes) as column:
            yield column, lanes
        with e.loop(whole, self.columns) as column:
            yield column, 0

    def read(self, begin: Value, column: Value, lanes: int) -> tuple[Value, Value, Value]:
        """Values, their magnitudes as bits, and which are outliers."""
        e = self.e
        value = load_float(e, self.level, begin + column * ITEMSIZE[self.dtype], self.dtype, lanes)
        magnitude = e.bits(value, Type("i32", lanes)) & 0x7FFFFFFF
        limit = e.splat(self.limit, lanes) if lanes else self.limit
        is_number = e.compare("ule", magnitude, _INFINITY)
        outlier = e.compare("uge", magnitude, limit) & is_number
        return value, magnitude, outlier

    def absmax(self, begin: Value) -> Value:
        """Largest magnitude of what is no outlier; NaN if there is one, as its bits are above those of infinity."""
        e = self.e
        found = {lanes: e.variable(Type("i32", lanes), 0) for lanes in (self.level.lanes, 0)}
        for column, lanes in self.walk():
            _, magnitude, outlier = self.read(begin, column, lanes)
            if self.split:
                magnitude = e.select(outlier, e.const(magnitude.type, 0), magnitude)
            found[lanes].set(e.maximum(found[lanes].get(), magnitude))
        return e.bits(e.maximum(e.largest(found[self.level.lanes].get()), found[0].get()), F32)

    def encode(self, begin: Value, codes: Value, column: Value, lanes: int, boost: Value, scale: Value) -> None:
        e = self.e
        value, _, outlier = self.read(begin, column, lanes)
        if lanes:
            boost, scale = e.splat(boost, lanes), e.splat(scale, lanes)
        scaled = value * boost * scale
        whole = e.bits(scaled + _ROUND, Type("i32", lanes)) - _ROUND_BITS
        none = e.compare("uno", scaled, scaled)
        whole = e.select(none | outlier if self.split else none, e.const(whole.type, 0), whole)
        e.store(e.convert("trunc", whole, self.code.elem), codes + column * self.size)

    def collect(self, begin: Value, column: Value, lanes: int, lists: Value, count: Variable) -> None:
        """Append the outliers' columns to the row's list."""
        e = self.e
        if not lanes:
            _, _, outlier = self.read(begin, column, 0)
            with e.when(outlier):
                place = e.convert("zext", count.get(), "i64")
                e.store(e.convert("trunc", column, "i32"), lists + (place << 2))
                count.set(count.get() + 1)
            return
        _, _, outliers = self.read(begin, column, lanes)
        mask = e.bits(outliers, Type(f"i{lanes}"))
        with e.when(e.compare("ne", mask, 0)), e.loop(column, column + lanes) as one:
            self.collect(begin, one, 0, lists, count)


def emit_product(e: Emitter, level: Level, *, dtype: str, tile: int, split: bool, full: str) -> None:
    """Write the kernel; some rows of the weight are a piece.

    Args:
        dtype: Of activations and output; ``i32`` leaves the sums of codes as they are.
        tile: Activations multiplied with a weight while it is in registers.
        split: Outliers are multiplied in fp32.
        full: dtype of the unquantized weight that they are multiplied with; empty for the dequantized one.
    """
    _Product(e, level, dtype, tile, split, full).emit()


class _Product:
    def __init__(self, e: Emitter, level: Level, dtype: str, tile: int, split: bool, full: str) -> None:
        self.e, self.level, self.dtype, self.tile, self.split, self.full_dtype = e, level, dtype, tile, split, full
        self.sums = Type("i32", level.lanes)
        self.pairs = level.machine == "x86_64"
        self.width = 2 * level.lanes if self.pairs else level.lanes
        for name in PRODUCT_ARGUMENTS:
            setattr(self, name, e.argument(name))

    def emit(self) -> None:
        e = self.e
        with e.pieces() as piece:
            start = piece * self.rows_a_piece
            stop = start + self.rows_a_piece
            stop = e.least(stop, self.rows)
            # A piece's weights stay in the cache while all activations pass.
            with e.loop(0, self.tiles) as tile, e.loop(start, stop) as row:
                totals = self.dot(self.weight + row * self.columns, self.x + tile * self.columns * (2 * self.tile))
                for place, total in enumerate(totals):
                    member = tile * self.tile + place
                    with e.when(e.compare("slt", member, self.batch)):
                        self.finish(row, member, total)

    def dot(self, weight: Value, x: Value) -> list[Value]:
        """Sums of products of one row of codes with a tile of activations, i32."""
        e, width = self.e, self.width
        vectors = [e.variable(self.sums, 0) for _ in range(self.tile)]
        scalars = [e.variable(I32, 0) for _ in range(self.tile)]
        most = (self.columns / (width * _UNROLL)) * (width * _UNROLL)
        whole = (self.columns / width) * width
        with e.loop(0, most, width * _UNROLL) as column:
            e.prefetch(weight + column + _PREFETCH)
            for part in range(_UNROLL):
                self.add_products(weight, x, column + part * width, vectors)
        with e.loop(most, whole, width) as column:
            self.add_products(weight, x, column, vectors)
        with e.loop(whole, self.columns) as column:
            code = e.convert("sext", e.load(I8, weight + column), "i32")
            for member, scalar in enumerate(scalars):
                other = e.convert("sext", e.load(I16, self.x_at(x, member, column)), "i32")
                scalar.set(scalar.get() + code * other)
        reduce = f"llvm.vector.reduce.add.{self.sums.suffix}"
        return [
            e.call(reduce, I32, [vector.get()]) + scalar.get() for vector, scalar in zip(vectors, scalars, strict=True)
        ]

    def x_at(self, x: Value, member: int, column: Value) -> Value:
        return x + (self.columns * member + column) * 2

    def add_products(self, weight: Value, x: Value, column: Value, vectors: list[Variable]) -> None:
        e = self.e
        codes = e.convert("sext", e.load(Type("i8", self.width), weight + column), "i16")
        for member, vector in enumerate(vectors):
            others = e.load(codes.type, self.x_at(x, member, column))
            vector.set(vector.get() + self.multiply(codes, others))

    def multiply(self, codes: Value, others: Value) -> Value:
        """i32 products, of neighbours added where the CPU does that by itself."""
        e = self.e
        if not self.pairs:
            return e.convert("sext", codes, "i32") * e.convert("sext", others, "i32")
        name = "llvm.x86.avx512.pmaddw.d.512" if self.level.lanes == 16 else "llvm.x86.avx2.pmadd.wd"
        return e.call(name, self.sums, [codes, others])

    def finish(self, row: Value, member: Value, total: Value) -> None:
        """Scale, add what the outliers and the bias are, round and store one product."""
        e = self.e
        if self.dtype == "i32":
            e.store(total, self.out + ((member * self.rows + row) << 2))
            return
        column_absmax = e.load(F32, self.column_absmax + (row << 2))
        row_absmax = e.load(F32, self.row_absmax + (member << 2))
        # Activations may be huge, weights are not: in this order nothing overflows that the result does not.
        scaled = e.convert("sitofp", total, "float") * (column_absmax * STEP_SQUARED) * row_absmax
        result = e.variable(F32, scaled)
        if self.split:
            result.set(result.get() + self.apart(row, member, column_absmax))
        with e.when(e.compare("ne", self.bias, e.const(I64, 0))):
            result.set(result.get() + e.load(F32, self.bias + (row << 2)))
        to = self.out + (member * self.rows + row) * ITEMSIZE[self.dtype]
        store_float(e, self.level, result.get(), to, self.dtype)

    def apart(self, row: Value, member: Value, column_absmax: Value) -> Value:
        """Product of the activation's outliers, in the order of their columns."""
        e = self.e
        found = e.variable(F32, 0.0)
        lists = self.outliers + member * self.columns * 4
        values = self.source + member * self.stride
        count = e.convert("zext", e.load(I32, self.counts + (member << 2)), "i64")
        with e.loop(0, count) as place:
            column = e.convert("zext", e.load(I32, lists + (place << 2)), "i64")
            value = load_float(e, self.level, values + column * ITEMSIZE[self.dtype], self.dtype)
            at = row * self.columns + column
            if self.full_dtype:
                address = self.full + at * ITEMSIZE[self.full_dtype]
                weight = load_float(e, self.level, address, self.full_dtype)
            else:
                weight = e.convert("sitofp", e.load(I8, self.weight + at), "float") * column_absmax * STEP
            found.set(e.fma(value, weight, found.get()))
        return found.get()
