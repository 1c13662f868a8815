"""LLM.int8() in plain Triton: rows of activations to codes, scales and outlier columns; outlier columns side by side.

Which columns hold outliers stays on the device, as one bit a column: products count bits instead of asking the host,
so that nothing waits for the GPU and a CUDA graph can hold it all.
"""

import triton
import triton.language as tl

__all__ = [
    "_bits",
    "_clear_kernel",
    "_code",
    "_count",
    "_int8_dequantize_kernel",
    "_int8_gather_kernel",
    "_int8_rows_kernel",
    "_is_outlier",
    "_nth_columns",
    "_or",
    "_scale",
    "_shrinking",
]

_TINY = tl.constexpr(2.0**-100)
_BOOST = tl.constexpr(2.0**100)
_ROUND = tl.constexpr(1.5 * 2.0**23)
_ROUND_BITS = tl.constexpr(0x4B400000)
_SIGN = tl.constexpr(-0x80000000)
_HUGE = tl.constexpr(0x72000000)
"""Bits of 2**101: sums of 131072 products of a code and smaller numbers are finite in fp32."""
_SHRINK = tl.constexpr(2.0**-32)
_GROW = tl.constexpr(2.0**32)


@triton.jit
def _is_outlier(value, threshold):
    """Magnitude at or above the threshold; NaN is none."""
    return tl.abs(value) >= threshold


@triton.jit
def _scale(top):
    """Boost and factor that turn values of absmax ``top`` into codes, as the reference rounds them."""
    boost = tl.where(top < _TINY, _BOOST, 1.0)
    return boost, tl.where(top == 0, 0.0, tl.div_rn(1.0, top * boost) * 127.0)


@triton.jit
def _code(value, boost, scale):
    """int32 codes; NaN gives 0. Needs ``enable_fp_fusion=False``: the product is rounded before ``_ROUND`` is added."""
    scaled = value * boost * scale
    whole = (scaled + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS
    return tl.where(scaled == scaled, whole, 0)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _larger(a, b):
    """The larger of two floats' bits, their signs aside; with a sign if either has one."""
    return tl.maximum(a & 0x7FFFFFFF, b & 0x7FFFFFFF) | ((a | b) & _SIGN)


@triton.jit
def _shrinking(top):
    """Factors that keep sums of outliers times codes finite, and undo it, by the sign that rows' absmax have."""
    huge = top.to(tl.int32, bitcast=True) < 0
    return tl.where(huge, _SHRINK, 1.0), tl.where(huge, _GROW, 1.0)


@triton.jit
def _clear_kernel(words, COUNT, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(words + place, tl.zeros((BLOCK,), tl.int32), mask=place < COUNT)


@triton.jit
def _bits(flags, COUNT: tl.constexpr):
    """``COUNT`` flags as one bit each of ``COUNT // 32`` words, the first in the lowest bit."""
    place = tl.arange(0, 32)[None, :]
    return tl.sum(tl.reshape(flags.to(tl.int32), (COUNT // 32, 32)) << place, axis=1)


@triton.jit
def _count(words):
    """Set bits of each word."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _nth_columns(words, upto, start, WORDS: tl.constexpr, COUNT: tl.constexpr):
    """Columns of set bits number ``start`` to ``start + COUNT``; ``upto`` counts them up to each word's end.

    By comparing and summing alone: registers cannot be written at a computed place. Past the last: any number.
    """
    number = start + tl.arange(0, COUNT)
    word = tl.sum((upto[None, :] <= number[:, None]).to(tl.int32), axis=1)
    here = tl.arange(0, WORDS)[None, :] == word[:, None]
    bits = tl.sum(tl.where(here, words[None, :], 0), axis=1)
    before = tl.sum(tl.where(here, (upto - _count(words))[None, :], 0), axis=1)
    bit = (bits[:, None] >> tl.arange(0, 32)[None, :]) & 1
    place = tl.sum((tl.cumsum(bit, axis=1) <= (number - before)[:, None]).to(tl.int32), axis=1)
    return word * 32 + place


@triton.jit
def _int8_rows_kernel(
    x, codes, absmax, words, threshold, K, x_stride,
    SPLIT: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes and absmax of one row of ``x``, and with SPLIT a bit for each column where it holds an outlier.

    SHARED: all rows set bits in the same words, which are zero before; else every row writes words of its own. A row
    with an outlier so large that its products with codes may overflow gets its absmax with a minus sign.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * K
    column = tl.arange(0, BLOCK)
    word = tl.arange(0, BLOCK // 32)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        value = tl.load(x + start + column, mask=start + column < K, other=0.0).to(tl.float32)
        # As integers, the bits of non-negative floats order like the floats, with NaN above inf: NaN wins.
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if SPLIT:
            outlier = _is_outlier(value, threshold)
            bits = tl.where(outlier, tl.where(bits >= _HUGE, _SIGN, 0), bits)
            found = _bits(outlier, BLOCK)
            number = start // 32 + word
            if SHARED:
                tl.atomic_or(words + number, found, mask=found != 0, sem="relaxed")
            else:
                tl.store(words + row * tl.cdiv(K, 32) + number, found, mask=number * 32 < K)
        largest = _larger(largest, bits)
    signed = tl.reduce(largest, 0, _larger)
    tl.store(absmax + row, signed.to(tl.float32, bitcast=True))
    boost, scale = _scale((signed & 0x7FFFFFFF).to(tl.float32, bitcast=True))
    for start in range(0, K, BLOCK):
        inside = start + column < K
        value = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        whole = _code(value, boost, scale)
        if SPLIT:
            whole = tl.where(_is_outlier(value, threshold), 0, whole)
        tl.store(codes + start + column, whole.to(tl.int8), mask=inside)


@triton.jit
def _gather(
    bits, upto, total, source, rows, first, threshold, R, stride,
    CAPACITY: tl.constexpr, WORDS: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    row = first.to(tl.int64) * BR + tl.arange(0, BR)
    for start in range(0, tl.minimum(total, CAPACITY), BO):
        number = start + tl.arange(0, BO)
        column = _nth_columns(bits, upto, start, WORDS, BO)
        inside = (row < R)[:, None] & (number < total)[None, :]
        value = tl.load(source + row[:, None] * stride + column[None, :], mask=inside, other=0)
        if CLIP:
            value = tl.where(_is_outlier(value.to(tl.float32), threshold), value, 0.0)
        place = rows + row[:, None] * CAPACITY + number[None, :]
        tl.store(place, value.to(rows.dtype.element_ty), mask=(row < R)[:, None])


@triton.jit
def _int8_gather_kernel(
    words, x, weight, apart_x, apart_weight, count, threshold, M, N, K, x_stride,
    CAPACITY: tl.constexpr, WORDS: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Copy the first CAPACITY outlier columns of ``x`` and of ``weight`` side by side, to ``(M or N, CAPACITY)``.

    What is below the threshold in ``x`` becomes 0. ``count`` becomes the number of outlier columns.
    """
    word = tl.arange(0, WORDS)
    bits = tl.load(words + word, mask=word * 32 < K, other=0)
    upto = tl.cumsum(_count(bits), axis=0)
    total = tl.sum(_count(bits), axis=0)
    tl.store(count, total)
    first = tl.program_id(0)
    blocks = tl.cdiv(M, BR)
    if first < blocks:
        _gather(bits, upto, total, x, apart_x, first, threshold, M, x_stride, CAPACITY, WORDS, BR, BO, True)
    else:
        first -= blocks
        _gather(bits, upto, total, weight, apart_weight, first, threshold, N, K, CAPACITY, WORDS, BR, BO, False)


@triton.jit
def _int8_dequantize_kernel(
    weight, absmax, out, N, K, first, columns, STEP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """``out[n, c] = weight[n, first + c] * absmax[n] / 127`` for ``columns`` columns, rounded once."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (row < N)[:, None] & (column < columns)[None, :]
    codes = tl.load(weight + row[:, None] * K + first + column[None, :], mask=inside, other=0)
    scale = tl.load(absmax + row, mask=row < N, other=0.0) * STEP
    value = codes.to(tl.float32) * scale[:, None]
    tl.store(out + row[:, None] * columns + column[None, :], value.to(out.dtype.element_ty), mask=inside)
