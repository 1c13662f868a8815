"""LLM.int8() of one row in one kernel: it quantizes the row while the weight is on its way from memory."""

import triton
import triton.language as tl

from halfbyte.backends.triton.kernels.int8 import _code, _is_outlier, _scale

__all__ = ["_int8_row_kernel"]


@triton.jit
def _dot4(a, b, ASM: tl.constexpr):
    """Sums of the products of the four int8 numbers in each of ``a`` and ``b``."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    total = (a << 24 >> 24) * (b << 24 >> 24)
    for byte in tl.static_range(1, 4):
        total += (a << (24 - 8 * byte) >> 24) * (b << (24 - 8 * byte) >> 24)
    return total


@triton.jit
def _packed(whole):
    """Four int8 numbers, the columns of ``whole``, in a word; the first in its lowest byte."""
    return tl.sum((whole & 0xFF) << (8 * tl.arange(0, 4))[None, :], axis=1)


@triton.jit
def _digit(whole):
    """The lowest digit of a number in base 256, from -128 to 127, and the number without it."""
    digit = ((whole + 128) & 0xFF) - 128
    return digit, (whole - digit) >> 8


@triton.jit
def _int8_row_kernel(
    x, weight, bias, column_absmax, out, threshold, N, K4,
    STEP: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr, ASM: tl.constexpr,
    EVEN: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """``out = x @ weight.T`` for one row; ``weight`` is ``(N, K4)``, four codes a word, ``K4 <= WORDS``.

    Outliers become fixed-point numbers of PLANES digits in base 256, below twice their largest's power of two: whole
    planes of int8 numbers, with exact sums as those of the codes have, and no list of columns. 3 digits hold 16-bit
    outliers exactly if they differ by less than a factor of 2^9, else to 2^-20 of the largest; 4 digits to 2^-28.

    Needs ``enable_fp_fusion=False``, as ``_code`` does.
    """
    SHIFT: tl.constexpr = 8 * PLANES - 4
    word = tl.arange(0, WORDS)
    line = tl.arange(0, BN)
    inside = word < K4
    blocks = tl.cdiv(N, BN)
    first = tl.program_id(0)
    # The weight's first rows are on their way while the activation is quantized.
    lines = tl.minimum(first * BN + line, N - 1).to(tl.int64)
    if EVEN:
        codes = tl.load(weight + lines[:, None] * K4 + word[None, :])
    else:
        codes = tl.load(weight + lines[:, None] * K4 + word[None, :], mask=inside[None, :], other=0)

    place = x + 4 * word[:, None] + tl.arange(0, 4)[None, :]
    value = tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)
    # As integers, the bits of non-negative floats order like the floats, with NaN above inf: NaN wins.
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if SPLIT:
        outlier = _is_outlier(value, threshold)
        largest = tl.max(tl.max(tl.where(outlier, bits, 0), axis=1), axis=0)
        bits = tl.where(outlier, 0, bits)
    top = tl.max(tl.max(bits, axis=1), axis=0).to(tl.float32, bitcast=True)
    boost, scale = _scale(top)
    whole = _code(value, boost, scale)
    some = False
    if SPLIT:
        four = _packed(tl.where(outlier, 0, whole))
        some = largest > 0
        infinite = largest == 0x7F800000
        exponent = tl.minimum(tl.maximum(largest >> 23, 64), 253)
        fixed = tl.where(outlier, value, 0.0) * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        sign = tl.where(value > 0, 1.0, -1.0)
        fixed = tl.where(infinite, tl.where(tl.abs(value) == float("inf"), sign, 0.0), fixed)
        unit = ((exponent - SHIFT) << 23).to(tl.float32, bitcast=True)
        unit = tl.where(infinite, float("inf"), unit)
        digits, rest = _digit((fixed * (1 << SHIFT)).to(tl.int32))
        plane0 = _packed(digits)
        digits, rest = _digit(rest)
        plane1 = _packed(digits)
        if PLANES == 4:
            digits, rest = _digit(rest)
            plane2 = _packed(digits)
        last = _packed(rest)
    else:
        four = _packed(whole)

    for block in range(first, blocks, PROGRAMS):
        n = block * BN + line
        following = n + PROGRAMS * BN
        wanted = (following < N)[:, None]
        if not EVEN:
            wanted = wanted & inside[None, :]
        upcoming = tl.load(weight + following.to(tl.int64)[:, None] * K4 + word[None, :], mask=wanted, other=0)
        total = tl.sum(_dot4(codes, four[None, :], ASM), axis=1).to(tl.float32)
        columns = tl.load(column_absmax + n, mask=n < N, other=0.0)
        # In this order nothing overflows that the result does not: the largest factor comes last.
        if SPLIT:
            columns *= STEP
            result = total * (top * STEP) * columns
            if some:
                apart = tl.sum(_dot4(codes, last[None, :], ASM), axis=1).to(tl.float32)
                if PLANES == 4:
                    apart = apart * 256 + tl.sum(_dot4(codes, plane2[None, :], ASM), axis=1).to(tl.float32)
                apart = apart * 256 + tl.sum(_dot4(codes, plane1[None, :], ASM), axis=1).to(tl.float32)
                apart = apart * 256 + tl.sum(_dot4(codes, plane0[None, :], ASM), axis=1).to(tl.float32)
                result += apart * columns * unit
        else:
            result = total * (columns * (STEP * STEP)) * top
        if BIAS:
            result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out + n, result.to(out.dtype.element_ty), mask=n < N)
        codes = upcoming
