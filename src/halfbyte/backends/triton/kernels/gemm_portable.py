"""The 4-bit product in plain Triton, for any GPU, dtype, K, blocksize and alignment; and the sum of partial
products."""

import triton
import triton.language as tl

__all__ = ["_gemm_4bit_portable_kernel", "_sum_partial_kernel"]


@triton.jit
def _gemm_4bit_portable_kernel(
    packed, x, absmax, absmax_8bit, absmax_code, absmax_offset, levels, bias, out, M, N, K, x_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    BIAS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """``out = x @ weight.T + bias`` for one tile; the weight is dequantized to x's dtype as in the reference.

    Codes are addressed one by one, so rows may start in the middle of a byte or a block. PRECISE multiplies fp32 in
    fp32.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    column = tl.arange(0, BK)
    row_start = n.to(tl.int64)[:, None] * K
    x_rows = x + m.to(tl.int64)[:, None] * x_stride
    inside_n = (n < N)[:, None]
    inside_m = (m < M)[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros((BM, BN), tl.float32)
    if NESTED:
        offset = tl.load(absmax_offset)
    for start in range(0, K, BK):
        k = (start + column)[None, :]
        element = row_start + k
        inside = inside_n & (k < K)
        byte = tl.load(packed + element // 2, mask=inside, other=0).to(tl.int32)
        code = (byte >> tl.where(element % 2 == 0, 4, 0)) & 15
        block = element // BLOCKSIZE
        if NESTED:
            q = tl.load(absmax_8bit + block, mask=inside, other=0).to(tl.int32)
            scale = tl.load(absmax_code + q) * tl.load(absmax + block // 256, mask=inside, other=0.0) + offset
        else:
            scale = tl.load(absmax + block, mask=inside, other=0.0)
        weight = (tl.load(levels + code) * scale).to(dtype)
        weight = tl.where(inside, weight, 0.0)
        activation = tl.load(x_rows + k, mask=inside_m & (k < K), other=0.0)
        if PRECISE:
            acc = tl.dot(activation, tl.trans(weight), acc, input_precision="ieee")
        else:
            acc = tl.dot(activation, tl.trans(weight), acc)
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    place = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside_m & (n < N)[None, :])


@triton.jit
def _sum_partial_kernel(partial, bias, out, numel, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    """``out = partial.sum(0) + bias`` in a fixed order; ``partial`` fp32 [SPLIT, numel], rows of N."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    total = tl.load(partial + i, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLIT):
        total += tl.load(partial + split * numel + i, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + i % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=inside)
