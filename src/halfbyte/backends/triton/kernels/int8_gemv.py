"""LLM.int8() of up to four rows in one kernel: it quantizes the rows while the weight is on its way from memory."""

import triton
import triton.language as tl

from halfbyte.backends.triton.kernels.int8 import _bits, _code, _count, _is_outlier, _nth_columns, _scale

__all__ = ["_int8_gemv_kernel"]


@triton.jit
def _dot4(a, b, c, ASM: tl.constexpr):
    """``c`` plus the products of the four int8 numbers in each of ``a`` and ``b``."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    for byte in tl.static_range(4):
        c += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
    return c


@triton.jit
def _int8_gemv_kernel(
    x, weight, out, bias, column_absmax, full, threshold, M, N, K, K4, x_stride,
    STEP: tl.constexpr, STEP_SQUARED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BX: tl.constexpr, BO: tl.constexpr, ASM: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    FULL: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """BN columns of ``out``, ``(M, N)``, for all M <= BM rows of ``x``. ``weight`` is ``(N, K4)``, four codes a word.

    Needs ``enable_fp_fusion=False``, as ``_code`` does.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    live = m < M
    lines = tl.minimum(n, N - 1).to(tl.int64)
    word = tl.arange(0, BK // 4)
    place = weight + lines[None, :, None] * K4 + word[None, None, :]
    # The weight's first words are on their way while the rows' scales are found.
    if EVEN:
        codes = tl.load(place)
    else:
        codes = tl.load(place, mask=(word < K4)[None, None, :], other=0)

    rows = x + m.to(tl.int64)[:, None] * x_stride
    column = tl.arange(0, BX)
    largest = tl.zeros((BM, BX), tl.int32)
    some = tl.zeros((BM, BX), tl.int32)
    for start in range(0, K, BX):
        inside = live[:, None] & (start + column < K)[None, :]
        value = tl.load(rows + (start + column)[None, :], mask=inside, other=0.0).to(tl.float32)
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if SPLIT:
            outlier = _is_outlier(value, threshold)
            bits = tl.where(outlier, 0, bits)
            some |= outlier.to(tl.int32)
        largest = tl.maximum(largest, bits)
    top = tl.max(largest, axis=1).to(tl.float32, bitcast=True)
    boost, scale = _scale(top)

    apart = tl.zeros((BM, BN), tl.float32)
    if SPLIT:
        narrow = weight.to(tl.pointer_type(tl.int8), bitcast=True) + lines[:, None] * K
        end = tl.where(tl.max(tl.max(some, axis=1), axis=0) > 0, K, 0)
        for block in range(0, end, BX):
            inside = live[:, None] & (block + column < K)[None, :]
            value = tl.load(rows + (block + column)[None, :], mask=inside, other=0.0).to(tl.float32)
            flags = tl.max(_is_outlier(value, threshold).to(tl.int32), axis=0)
            words = _bits(flags, BX)
            upto = tl.cumsum(_count(words), axis=0)
            total = tl.sum(_count(words), axis=0)
            for start in range(0, total, BO):
                k = block + _nth_columns(words, upto, start, BX // 32, BO)
                valid = (start + tl.arange(0, BO) < total)[None, :]
                a = tl.load(rows + k[None, :], mask=live[:, None] & valid, other=0.0).to(tl.float32)
                a = tl.where(_is_outlier(a, threshold), a, 0.0)
                if FULL:
                    b = tl.load(full + lines[:, None] * K + k[None, :], mask=valid, other=0.0).to(tl.float32)
                else:
                    b = tl.load(narrow + k[None, :], mask=valid, other=0).to(tl.float32)
                apart += tl.sum(a[:, None, :] * b[None, :, :], axis=2)

    byte = tl.arange(0, 4)[None, None, :]
    sums = tl.zeros((BM, BN, BK // 4), tl.int32)
    for start in range(0, K4, BK // 4):
        following = start + BK // 4 + word
        upcoming = tl.load(place + start + BK // 4, mask=(following < K4)[None, None, :], other=0)
        k = (start + word) * 4
        inside = live[:, None, None] & (k < K)[None, :, None]
        value = tl.load(rows[:, :, None] + k[None, :, None] + byte, mask=inside, other=0.0).to(tl.float32)
        whole = _code(value, boost[:, None, None], scale[:, None, None])
        if SPLIT:
            whole = tl.where(_is_outlier(value, threshold), 0, whole)
        four = tl.sum((whole & 0xFF) << (8 * byte), axis=2)
        sums = _dot4(codes, four[:, None, :], sums, ASM)
        codes = upcoming

    total = tl.sum(sums, axis=2).to(tl.float32)
    columns = tl.load(column_absmax + lines)
    if FULL:
        result = total * (top * STEP_SQUARED)[:, None] * columns[None, :] + apart
    elif SPLIT:
        result = (total * (top * STEP)[:, None] + apart) * (columns * STEP)[None, :]
    else:
        result = total * (top * STEP_SQUARED)[:, None] * columns[None, :]
    if BIAS:
        result += tl.load(bias + lines).to(tl.float32)[None, :]
    target = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])
