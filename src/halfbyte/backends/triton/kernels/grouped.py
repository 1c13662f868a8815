"""Rows sorted by expert, and their products with their experts' weights, in plain Triton: any shape and dtype."""

import triton
import triton.language as tl

__all__ = ["_gemm_4bit_grouped_portable_kernel", "_group_rows_kernel", "_place_rows_kernel"]


@triton.jit(do_not_specialize=["S", "E", "row_programs"])
def _group_rows_kernel(experts, order, ends, S, E, row_programs, MINE: tl.constexpr, OTHERS: tl.constexpr):
    """The stable sort of up to a few thousand numbers below E in one launch: every row counts those before it.

    The first ``row_programs`` programs place MINE rows each, the others find the ends of MINE experts each.
    """
    program = tl.program_id(0)
    mine = tl.arange(0, MINE)
    other = tl.arange(0, OTHERS)
    count = tl.zeros((MINE,), tl.int32)
    if program < row_programs:
        row = program * MINE + mine
        own = tl.load(experts + row, mask=row < S, other=0).to(tl.int32)
        own = tl.where((own < 0) | (own >= E), E, own)
        for start in range(0, S, OTHERS):
            j = start + other
            key = tl.load(experts + j, mask=j < S, other=0).to(tl.int32)
            key = tl.where((key < 0) | (key >= E), E, key)
            before = (key[None, :] < own[:, None]) | ((key[None, :] == own[:, None]) & (j[None, :] < row[:, None]))
            count += tl.sum((before & (j < S)[None, :]).to(tl.int32), 1)
        tl.store(order + count, row, mask=row < S)
    else:
        expert = (program - row_programs) * MINE + mine
        for start in range(0, S, OTHERS):
            j = start + other
            key = tl.load(experts + j, mask=j < S, other=0).to(tl.int32)
            key = tl.where((key < 0) | (key >= E), E, key)
            count += tl.sum(((key[None, :] <= expert[:, None]) & (j < S)[None, :]).to(tl.int32), 1)
        tl.store(ends + expert, count, mask=expert < E)


@triton.jit
def _gemm_4bit_grouped_portable_kernel(
    packed, x, order, ends, absmax, absmax_8bit, absmax_code, absmax_offset, levels, bias, out,
    S, E, N, K, x_stride, repeat,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKSIZE: tl.constexpr,
    TRANSPOSED: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """One tile of up to BM rows of one expert: tile ``program_id(0)`` of all experts' tiles in a row.

    The last, E-th expert holds the rows that have none: they become zeros. N is the result's width, K the
    activation's; the weight of an expert is stored as (N, K), or as (K, N) where TRANSPOSED.
    """
    tile = tl.program_id(0)
    e = tl.arange(0, EP)
    stop = tl.load(ends + e, mask=e < E, other=S)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e <= E), other=0)
    begin = tl.where(e > E, S, begin)
    tiles = (stop - begin + BM - 1) // BM
    before = tl.cumsum(tiles, 0) <= tile
    expert = tl.sum(before.to(tl.int32), 0)
    if expert > E:
        return
    first = tl.max(tl.where(before, stop, 0), 0) + (tile - tl.sum(tl.where(before, tiles, 0), 0)) * BM
    last = tl.min(tl.where(before, S, stop), 0)

    n = tl.program_id(1) * BN + tl.arange(0, BN)
    place = first + tl.arange(0, BM)
    inside_m = place < last
    row = tl.load(order + place, mask=inside_m, other=0)
    x_rows = x + (row // repeat).to(tl.int64)[:, None] * x_stride
    column = tl.arange(0, BK)
    inside_n = n < N
    here = tl.minimum(expert, E - 1).to(tl.int64)
    start_of_expert = here * N * K
    dtype: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros((BM, BN), tl.float32)
    if NESTED:
        offset = tl.load(absmax_offset)
    for start in range(0, K, BK):
        k = start + column
        if TRANSPOSED:
            element = start_of_expert + k.to(tl.int64)[:, None] * N + n[None, :]
            inside = (k < K)[:, None] & inside_n[None, :]
        else:
            element = start_of_expert + n.to(tl.int64)[None, :] * K + k[:, None]
            inside = (k < K)[:, None] & inside_n[None, :]
        byte = tl.load(packed + element // 2, mask=inside, other=0).to(tl.int32)
        code = (byte >> tl.where(element % 2 == 0, 4, 0)) & 15
        block = element // BLOCKSIZE
        if NESTED:
            q = tl.load(absmax_8bit + block, mask=inside, other=0).to(tl.int32)
            scale = tl.load(absmax_code + q) * tl.load(absmax + block // 256, mask=inside, other=0.0) + offset
        else:
            scale = tl.load(absmax + block, mask=inside, other=0.0)
        weight = tl.where(inside, (tl.load(levels + code) * scale).to(dtype), 0.0)
        activation = tl.load(x_rows + k[None, :], mask=inside_m[:, None] & (k < K)[None, :], other=0.0)
        if PRECISE:
            acc = tl.dot(activation, weight, acc, input_precision="ieee")
        else:
            acc = tl.dot(activation, weight, acc)
    if BIAS:
        acc += tl.load(bias + here * N + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(expert < E, acc, 0.0)
    target = out + row.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


@triton.jit(do_not_specialize=["E", "first"])
def _place_rows_kernel(
    part, order, ends, bias, out, E, width, part_stride, out_stride, first,
    EP: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """``out[order[i], first:first + width] = part[i] + bias[expert of i]``; zeros where row i has no expert.

    Grid: (rows, tiles of COLUMNS); ``first`` is a multiple of 8. What ``part`` holds in rows without an expert is not
    read.
    """
    i = tl.program_id(0)
    first = first // 8 * 8  # which tells the compiler
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    there = inside & (column * 0 + i < tl.load(ends + E - 1))
    value = tl.load(part + i.to(tl.int64) * part_stride + column, mask=there, other=0.0)
    if BIAS:
        e = tl.arange(0, EP)
        expert = tl.sum(((tl.load(ends + e, mask=e < E, other=0) <= i) & (e < E)).to(tl.int32), 0)
        added = bias + expert.to(tl.int64) * out_stride + first + column
        value = value.to(tl.float32) + tl.load(added, mask=there, other=0.0).to(tl.float32)
    row = tl.load(order + i).to(tl.int64)
    tl.store(out + row * out_stride + first + column, value.to(out.dtype.element_ty), mask=inside)
