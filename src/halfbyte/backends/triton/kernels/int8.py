"""LLM.int8() in plain Triton: rows to codes, scales and outlier columns; int8 tensor-core product with outliers inside.

The list of outlier columns and its length stay on the device: the product reads the length and loops that often, so no
host has to wait for it and a CUDA graph can hold it all. Codes up to 127 are exact in bf16 and fp16: outliers are
multiplied with them on tensor cores and scaled afterwards, in fp32.
"""

import triton
import triton.language as tl

__all__ = ["_int8_columns_kernel", "_int8_product_kernel", "_int8_rows_kernel"]

_TINY = tl.constexpr(2.0**-100)
_BOOST = tl.constexpr(2.0**100)
_ROUND = tl.constexpr(1.5 * 2.0**23)
_ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _is_outlier(value, threshold):
    """Magnitude at or above the threshold; NaN is none."""
    return tl.abs(value) >= threshold


@triton.jit
def _int8_rows_kernel(
    x, codes, absmax, flags, threshold, K, x_stride,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes and absmax of one row of ``x``; ``flags[k]`` becomes 1 where column ``k`` holds an outlier.

    Needs ``enable_fp_fusion=False``: adding ``_ROUND`` rounds the product before it only if that stays a product.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * K
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        inside = start + column < K
        value = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        # As integers, the bits of non-negative floats order like the floats, with NaN above inf: NaN wins.
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if SPLIT:
            outlier = _is_outlier(value, threshold)
            bits = tl.where(outlier, 0, bits)
            tl.store(flags + start + column, 1, mask=outlier & inside)
        largest = tl.maximum(largest, bits)
    top = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    tl.store(absmax + row, top)
    boost = tl.where(top < _TINY, _BOOST, 1.0)
    scale = tl.where(top == 0, 0.0, tl.div_rn(1.0, top * boost) * 127.0)
    for start in range(0, K, BLOCK):
        inside = start + column < K
        value = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        scaled = value * boost * scale
        whole = (scaled + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS
        whole = tl.where(scaled == scaled, whole, 0)
        if SPLIT:
            whole = tl.where(_is_outlier(value, threshold), 0, whole)
        tl.store(codes + start + column, whole.to(tl.int8), mask=inside)


@triton.jit
def _int8_columns_kernel(flags, columns, count, K, BLOCK: tl.constexpr):
    """The flagged columns in rising order, and how many they are. One program."""
    found = 0
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        flag = tl.load(flags + column, mask=column < K, other=0)
        place = found + tl.cumsum(flag, axis=0) - flag
        tl.store(columns + place, column, mask=flag != 0)
        found += tl.sum(flag, axis=0)
    tl.store(count, found)


@triton.jit
def _int8_product_kernel(
    codes, weight, out, bias, row_absmax, column_absmax, x, full, columns, count, threshold, M, N, K, x_stride,
    STEP: tl.constexpr, STEP_SQUARED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BO: tl.constexpr, GROUP: tl.constexpr, RAW: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """One tile of ``codes @ weight.T``, scaled, plus outliers and bias. RAW stores the sums as they are.

    SPLIT adds ``x[:, columns]`` times the weight (FULL: the unquantized one); ``x`` below the threshold counts as 0.
    """
    # Tiles of GROUP rows of tiles follow each other down the rows, so that they share weights in the cache.
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BN)
    wide = GROUP * tiles_n
    first = (pid // wide) * GROUP
    height = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    m = (first + (pid % wide) % height) * BM + tl.arange(0, BM)
    n = ((pid % wide) // height) * BN + tl.arange(0, BN)
    inside_m = (m < M)[:, None]
    inside_n = (n < N)[None, :]
    rows = m.to(tl.int64)[:, None]
    weights = n.to(tl.int64)[None, :] * K
    column = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        k = start + column
        a = tl.load(codes + rows * K + k[None, :], mask=inside_m & (k < K)[None, :], other=0)
        b = tl.load(weight + weights + k[:, None], mask=inside_n & (k < K)[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    place = out + rows * N + n[None, :]
    if RAW:
        tl.store(place, sums, mask=inside_m & inside_n)
    else:
        scale = tl.load(column_absmax + n, mask=n < N, other=0.0)
        row_scale = tl.load(row_absmax + m, mask=m < M, other=0.0) * STEP_SQUARED
        result = sums.to(tl.float32) * row_scale[:, None] * scale[None, :]
        if SPLIT:
            apart = tl.zeros((BM, BN), tl.float32)
            total = tl.load(count)
            for start in range(0, total, BO):
                number = start + tl.arange(0, BO)
                k = tl.load(columns + number, mask=number < total, other=0).to(tl.int64)
                a = tl.load(x + rows * x_stride + k[None, :], mask=inside_m & (number < total)[None, :], other=0.0)
                a = tl.where(_is_outlier(a.to(tl.float32), threshold), a, 0.0).to(x.dtype.element_ty)
                inside = inside_n & (number < total)[:, None]
                if FULL:
                    b = tl.load(full + weights + k[:, None], mask=inside, other=0.0)
                else:
                    b = tl.load(weight + weights + k[:, None], mask=inside, other=0).to(x.dtype.element_ty)
                apart = tl.dot(a, b, apart, input_precision="ieee")
            if FULL:
                result += apart
            else:
                result += apart * (scale * STEP)[None, :]
        if BIAS:
            result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=inside_m & inside_n)
