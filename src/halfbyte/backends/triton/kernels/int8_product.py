"""The int8 product on tensor cores, scaled, with outliers and bias inside.

Codes up to 127 are exact in bf16 and fp16: outliers are multiplied with them on tensor cores and scaled in fp32.
"""

import triton
import triton.language as tl

from halfbyte.backends.triton.kernels.int8 import _count, _is_outlier, _nth_columns, _or, _shrinking

__all__ = ["_int8_product_kernel"]


@triton.jit
def _tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile numbers; tiles of GROUP rows of tiles follow each other down the rows, to share weights in the cache."""
    wide = GROUP * tiles_n
    first = (pid // wide) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + (pid % wide) % height, (pid % wide) // height


@triton.jit
def _add_outliers(
    result, first, m, n, shrink, x, weight, full, words, apart_x, apart_weight, count, threshold, M, N, K, x_stride,
    BM: tl.constexpr, BO: tl.constexpr, CAPACITY: tl.constexpr, WORDS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """``result`` plus outliers of ``x``, times ``shrink``, times the weight's codes (FULL: the unquantized weight).

    The first CAPACITY outlier columns lie side by side in ``apart_x`` and ``apart_weight``; the others are looked up
    in the weight, by the bits in ``words``: one row of them for all, or (no CAPACITY) one for each row of ``x``.
    """
    inside_m = (m < M)[:, None]
    inside_n = (n < N)[None, :]
    rows = (m % M).to(tl.int64)[:, None]
    lines = tl.minimum(n, N - 1).to(tl.int64)[None, :]
    if CAPACITY > 0:
        found = tl.load(count)
        for start in range(0, tl.minimum(found, CAPACITY), BO):
            number = start + tl.arange(0, BO)
            a = tl.load(apart_x + rows * CAPACITY + number[None, :])
            a = (a.to(tl.float32) * shrink[:, None]).to(x.dtype.element_ty)
            b = tl.load(apart_weight + lines * CAPACITY + number[:, None])
            result = tl.dot(a, b, result, input_precision="ieee")
        more = found > CAPACITY
    else:
        more = True
    if more:
        for block in range(0, tl.cdiv(K, 32), WORDS):
            word = block + tl.arange(0, WORDS)
            if CAPACITY > 0:
                bits = tl.load(words + word, mask=word * 32 < K, other=0)
            else:
                own = tl.zeros((16, WORDS), tl.int32)
                for part in tl.range(0, BM, 16, loop_unroll_factor=2):
                    line = first + part + tl.arange(0, 16)
                    known = (line < M)[:, None] & (word * 32 < K)[None, :]
                    own |= tl.load(words + line[:, None] * tl.cdiv(K, 32) + word[None, :], mask=known, other=0)
                bits = tl.reduce(own, 0, _or)
            upto = tl.cumsum(_count(bits), axis=0)
            total = tl.sum(_count(bits), axis=0)
            for start in range(CAPACITY, total, BO):
                k = (block * 32 + _nth_columns(bits, upto, start, WORDS, BO)).to(tl.int64)
                valid = start + tl.arange(0, BO) < total
                a = tl.load(x + rows * x_stride + k[None, :], mask=inside_m & valid[None, :], other=0.0)
                a = tl.where(_is_outlier(a.to(tl.float32), threshold), a, 0.0).to(tl.float32) * shrink[:, None]
                a = a.to(x.dtype.element_ty)
                inside = inside_n & valid[:, None]
                if FULL:
                    b = tl.load(full + lines * K + k[:, None], mask=inside, other=0.0)
                else:
                    b = tl.load(weight + lines * K + k[:, None], mask=inside, other=0).to(x.dtype.element_ty)
                result = tl.dot(a, b, result, input_precision="ieee")
    return result


@triton.jit
def _finish(
    sums, first, m, n, weight, out, bias, row_absmax, column_absmax, x, full, words, apart_x, apart_weight, count,
    threshold, M, N, K, x_stride,
    STEP: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, CAPACITY: tl.constexpr, WORDS: tl.constexpr,
    RAW: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Scale a tile of integer sums, add outliers and bias, store. RAW stores the sums as they are."""
    inside = (m < M)[:, None] & (n < N)[None, :]
    place = out + m.to(tl.int64)[:, None] * N + n[None, :]
    if RAW:
        tl.store(place, sums, mask=inside)
    else:
        columns = tl.load(column_absmax + n, mask=n < N, other=0.0)
        top = tl.load(row_absmax + m, mask=m < M, other=0.0)
        shrink, grow = _shrinking(top)
        # In this order nothing overflows that the result does not: the largest factor comes last.
        if SPLIT and not FULL:
            # Outliers times codes lack one factor, the column's: it comes after both were added.
            result = sums.to(tl.float32) * (tl.abs(top) * STEP * shrink)[:, None]
        elif SPLIT:
            result = sums.to(tl.float32) * (columns * (STEP * STEP))[None, :] * tl.abs(top)[:, None]
        else:
            result = sums.to(tl.float32) * (columns * (STEP * STEP))[None, :] * top[:, None]
        if SPLIT:
            result = _add_outliers(
                result, first, m, n, shrink, x, weight, full, words, apart_x, apart_weight, count, threshold, M, N, K,
                x_stride, BM, BO, CAPACITY, WORDS, FULL,
            )  # fmt: skip
            if not FULL:
                result = result * (columns * STEP)[None, :] * grow[:, None]
        if BIAS:
            result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _int8_product_kernel(
    codes, weight, out, bias, row_absmax, column_absmax, x, full, words, apart_x, apart_weight, count, threshold,
    M, N, K, x_stride,
    STEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, CAPACITY: tl.constexpr, WORDS: tl.constexpr, RAW: tl.constexpr, SPLIT: tl.constexpr,
    FULL: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One tile of ``codes @ weight.T``, scaled, plus outliers of ``x`` and bias. EVEN: BK divides K."""
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    column = tl.arange(0, BK)
    # Rows past the end begin again, and are not stored. Were they all the last one, every program would read that.
    a_place = codes + (m % M).to(tl.int64)[:, None] * K + column[None, :]
    b_place = weight + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + column[:, None]
    sums = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        if EVEN:
            a = tl.load(a_place + start)
            b = tl.load(b_place + start)
        else:
            a = tl.load(a_place + start, mask=(start + column < K)[None, :], other=0)
            b = tl.load(b_place + start, mask=(start + column < K)[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    _finish(
        sums, tile_m * BM, m, n, weight, out, bias, row_absmax, column_absmax, x, full, words, apart_x, apart_weight,
        count, threshold, M, N, K, x_stride,
        STEP, BM, BO, CAPACITY, WORDS, RAW, SPLIT, FULL, BIAS,
    )  # fmt: skip
