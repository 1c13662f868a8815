"""The small-batch kernel's way of multiplying, for rows sorted by expert: one launch for all experts of a layer."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from halfbyte.backends.triton.kernels.gemm_small_batch import (
    _activation_layout,
    _multiply,
    _scale_layout,
    _sums_layout,
    _word_layout,
)
from halfbyte.backends.triton.kernels.pair_table import _fill_pair_table

__all__ = ["_gemm_4bit_grouped_kernel"]


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _tile_of(ends, tile, S, E, BM: gl.constexpr, EP: gl.constexpr, WARPS: gl.constexpr):
    """Expert, first and last place of tile number ``tile`` of all experts' tiles; rows without expert count as
    expert E's, and tiles that there are not as those of later ones."""
    layout: gl.constexpr = gl.BlockedLayout([max(EP // 32, 1)], [32], [WARPS], [0])
    e = gl.arange(0, EP, layout)
    stop = gl.load(ends + e, mask=e < E, other=0)
    stop = gl.where(e < E, stop, S)
    begin = gl.load(ends + gl.maximum(e - 1, 0), mask=(e > 0) & (e <= E), other=0)
    begin = gl.where(e > E, S, begin)
    tiles = (stop - begin + BM - 1) // BM
    before = gl.associative_scan(tiles, 0, _add) <= tile
    expert = gl.sum(before.to(gl.int32), 0)
    first = gl.max(gl.where(before, stop, 0), 0) + (tile - gl.sum(gl.where(before, tiles, 0), 0)) * BM
    last = gl.min(gl.where(before, S, stop), 0)
    return expert, first, last


@gluon.jit
def _rows_of_expert(
    w_ptr, x_ptr, order, absmax, absmax_8bit, absmax_code, absmax_offset, bias_ptr, out_ptr, pairs,
    expert, here, place, last, repeat, N, row_words, row_blocks, x_stride, groups, per_slice,
    BN: gl.constexpr, BM: gl.constexpr, J: gl.constexpr, U: gl.constexpr, CHAIN: gl.constexpr,
    BLOCK_GROUPS: gl.constexpr, KW: gl.constexpr, NW: gl.constexpr, EVEN: gl.constexpr, NESTED: gl.constexpr,
    BIAS: gl.constexpr, AHEAD: gl.constexpr, FILLED: gl.constexpr,
):  # fmt: skip
    """Places ``place`` to ``last``, at most BM, of expert ``here``; zeros where ``expert`` is another, hence none."""
    NS: gl.constexpr = U // CHAIN
    acc_l: gl.constexpr = _sums_layout(KW, NW)
    w_l: gl.constexpr = _word_layout(KW, NW, BN, J)
    x_l: gl.constexpr = _activation_layout(KW, NW, BM, J)
    s_l: gl.constexpr = _scale_layout(KW, NW, BN, NS)
    first = gl.program_id(1) * BN

    wz = gl.arange(0, KW, gl.SliceLayout(1, gl.SliceLayout(2, w_l)))
    wn = gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, w_l)))
    ww = gl.arange(0, 4 * J, gl.SliceLayout(0, gl.SliceLayout(1, w_l)))
    lane = (wn % 8)[None, :, None] * 4 + (ww // J)[None, None, :]
    wn = gl.minimum(first + wn, N - 1)
    w_start = (wz * per_slice)[:, None, None]
    words = w_ptr.cast(gl.pointer_type(gl.int32), bitcast=True) + here.to(gl.int64) * N * row_words
    w_ptrs = words + ((wn * row_words)[None, :, None] + w_start * (4 * J) + ww[None, None, :])

    xz = gl.arange(0, KW, gl.SliceLayout(1, gl.SliceLayout(2, x_l)))
    xm = place + gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(2, x_l)))
    xk = gl.arange(0, 32 * J, gl.SliceLayout(0, gl.SliceLayout(1, x_l)))[None, None, :]
    x_start = (xz * per_slice)[:, None, None]
    x_row = gl.load(order + xm, mask=xm < last, other=0) // repeat
    x_ptrs = x_ptr + (x_row.to(gl.int64)[None, :, None] * x_stride + (x_start * (32 * J) + xk))
    x_mask = (xm < last)[None, :, None]

    sz = gl.arange(0, KW, gl.SliceLayout(1, gl.SliceLayout(2, s_l)))
    sn = gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, s_l)))
    si = gl.arange(0, NS, gl.SliceLayout(0, gl.SliceLayout(1, s_l)))[None, None, :]
    sn = here * N + gl.minimum(first + sn, N - 1)
    s_start = (sz * per_slice)[:, None, None]
    s_row = (sn * row_blocks)[None, :, None]
    scales = absmax_8bit if NESTED else absmax
    acc = _multiply(
        (w_ptrs, w_start, lane), (x_ptrs, x_mask, x_start), (scales, s_row, s_start, si),
        (absmax, absmax_code, absmax_offset), pairs, groups, per_slice, acc_l,
        BN, BM, J, U, CHAIN, BLOCK_GROUPS, KW, NW, EVEN, True, NESTED, AHEAD, FILLED,
    )  # fmt: skip

    total = gl.sum(acc, axis=0)
    o_l: gl.constexpr = gl.SliceLayout(0, acc_l)
    n = first + gl.arange(0, BN, gl.SliceLayout(1, o_l))
    m = place + gl.arange(0, BM, gl.SliceLayout(0, o_l))
    keep = (n < N)[:, None] & (m < last)[None, :]
    if BIAS:
        total += gl.load(bias_ptr + (here.to(gl.int64) * N + n), mask=n < N, other=0.0).to(gl.float32)[:, None]
    total = gl.where(expert == here, total, 0.0)
    row = gl.load(order + m, mask=m < last, other=0).to(gl.int64)
    gl.store(out_ptr + (row[None, :] * N + n[:, None]), total.to(out_ptr.dtype.element_ty), mask=keep)


@gluon.jit(do_not_specialize=["S", "E", "repeat"])
def _gemm_4bit_grouped_kernel(
    w_ptr, x_ptr, order, ends, absmax, absmax_8bit, absmax_code, absmax_offset, bias_ptr, out_ptr, pairs,
    S, E, repeat, N, row_words, row_blocks, x_stride, groups, per_slice,
    EP: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, J: gl.constexpr, U: gl.constexpr, CHAIN: gl.constexpr,
    BLOCK_GROUPS: gl.constexpr, KW: gl.constexpr, NW: gl.constexpr, EVEN: gl.constexpr, NESTED: gl.constexpr,
    BIAS: gl.constexpr, AHEAD: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """``out[s] = x[s // repeat] @ weight[expert of s].T + bias[expert of s]`` for up to BM rows of one expert.

    Grid: (tiles of BM rows, tiles of BN columns). Numbers and constants are those of the small-batch kernel, for one
    expert; blocks never straddle rows. The weight and its scales are loaded one iteration ahead where AHEAD. With
    HALVES a tile of at most BM/2 rows is computed as such.
    """
    expert, place, last = _tile_of(ends, gl.program_id(0), S, E, BM, EP, KW * NW)
    if expert > E:
        return
    here = gl.minimum(expert, E - 1)
    if HALVES:
        table = _fill_pair_table(pairs, KW * NW)
        if last - place <= BM // 2:
            _rows_of_expert(
                w_ptr, x_ptr, order, absmax, absmax_8bit, absmax_code, absmax_offset, bias_ptr, out_ptr, table,
                expert, here, place, last, repeat, N, row_words, row_blocks, x_stride, groups, per_slice,
                BN, BM // 2, J, U, CHAIN, BLOCK_GROUPS, KW, NW, EVEN, NESTED, BIAS, AHEAD, True,
            )  # fmt: skip
        else:
            _rows_of_expert(
                w_ptr, x_ptr, order, absmax, absmax_8bit, absmax_code, absmax_offset, bias_ptr, out_ptr, table,
                expert, here, place, last, repeat, N, row_words, row_blocks, x_stride, groups, per_slice,
                BN, BM, J, U, CHAIN, BLOCK_GROUPS, KW, NW, EVEN, NESTED, BIAS, AHEAD, True,
            )  # fmt: skip
    else:
        _rows_of_expert(
            w_ptr, x_ptr, order, absmax, absmax_8bit, absmax_code, absmax_offset, bias_ptr, out_ptr, pairs,
            expert, here, place, last, repeat, N, row_words, row_blocks, x_stride, groups, per_slice,
            BN, BM, J, U, CHAIN, BLOCK_GROUPS, KW, NW, EVEN, NESTED, BIAS, AHEAD, False,
        )  # fmt: skip
