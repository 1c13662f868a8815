"""The 4-bit product for up to 16 rows of activations, one program a place on the GPU, in Gluon (sm_80 and later).

As gemm_small_batch, whose fragments it uses: the warps of a program share K, and their sums meet once for every tile of
the weight's rows. But a program takes one tile after the other, and the loads of the next tile are under way while the
sums of this one meet. So the decode table is filled once, no multiprocessor waits for a new program, and all of them
read memory to the end: a grid of tiles leaves some without work in its last round.

Two iterations take turns, each with registers of its own: to pass what was loaded from one to the other would be to
wait for it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from halfbyte.backends.triton.kernels.gemm_small_batch import (
    _accumulate,
    _activation_layout,
    _block_index,
    _load_activations,
    _load_words,
    _scale_layout,
    _scales_of,
    _sums_layout,
    _word_layout,
)
from halfbyte.backends.triton.kernels.pair_table import _fill_pair_table

__all__ = ["_gemm_4bit_persistent_kernel"]


@gluon.jit
def _fetch(
    tile, iteration, place, addresses, sizes,
    BN: gl.constexpr, J: gl.constexpr, U: gl.constexpr, CHAIN: gl.constexpr, BLOCK_GROUPS: gl.constexpr,
):  # fmt: skip
    """Words, block numbers and scales or their codes of an iteration of a tile."""
    wn, w_start, ww, sn, s_start, si = place
    words, scales = addresses
    N, row_words, row_blocks, groups = sizes
    w_row = (gl.minimum(tile * BN + wn, N - 1) * row_words)[None, :, None]
    ws = _load_words(words + (w_row + (w_start * (4 * J) + ww)), w_start, iteration * U, groups, J, U, True)
    s_row = (gl.minimum(tile * BN + sn, N - 1) * row_blocks)[None, :, None]
    index = _block_index(s_row, s_start, iteration * U, si, CHAIN, BLOCK_GROUPS, True)
    return (ws, index, gl.load(scales + index))


@gluon.jit
def _next(tile, iteration, iterations, programs, last):
    """The iteration after this one: the last tile's again past the end."""
    iteration += 1
    if iteration == iterations:
        iteration = 0
        tile = gl.minimum(tile + programs, last)
    return tile, iteration


@gluon.jit
def _finish(acc, tile, result, BN: gl.constexpr, BM: gl.constexpr, BIAS: gl.constexpr):
    """Add the warps' sums [KW, BN, BM] and write the tile."""
    bias_ptr, out_ptr, M, N = result
    o_l: gl.constexpr = gl.SliceLayout(0, acc.type.layout)
    total = gl.sum(acc, axis=0)
    n = tile * BN + gl.arange(0, BN, gl.SliceLayout(1, o_l))
    m = gl.arange(0, BM, gl.SliceLayout(0, o_l))
    keep = (n < N)[:, None] & (m < M)[None, :]
    if BIAS:
        total += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    gl.store(out_ptr + m[None, :] * N + n[:, None], total.to(out_ptr.dtype.element_ty), mask=keep)


@gluon.jit(do_not_specialize=["M", "iterations", "tiles", "programs"])
def _gemm_4bit_persistent_kernel(
    w_ptr, x_ptr, absmax, absmax_8bit, absmax_code, absmax_offset, bias_ptr, out_ptr, pairs,
    M, N, row_words, row_blocks, x_stride, iterations, tiles, programs,
    BN: gl.constexpr, BM: gl.constexpr, J: gl.constexpr, U: gl.constexpr, CHAIN: gl.constexpr,
    BLOCK_GROUPS: gl.constexpr, KW: gl.constexpr, NW: gl.constexpr, NESTED: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """``out[m, n] = sum_k x[m, k] * level(w[n, k]) * absmax + bias[n]``.

    Grid: ``programs``, which share ``tiles`` of BN rows of the weight. Each of KW slices of K has ``iterations`` of U
    groups of 32*J columns, without a rest; blocks do not straddle rows. Other constants are those of the small-batch
    kernel.
    """
    NS: gl.constexpr = U // CHAIN
    acc_l: gl.constexpr = _sums_layout(KW, NW)
    w_l: gl.constexpr = _word_layout(KW, NW, BN, J)
    x_l: gl.constexpr = _activation_layout(KW, NW, BM, J)
    s_l: gl.constexpr = _scale_layout(KW, NW, BN, NS)
    per_slice = iterations * U
    groups = per_slice * KW

    wz = gl.arange(0, KW, gl.SliceLayout(1, gl.SliceLayout(2, w_l)))
    wn = gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, w_l)))
    ww = gl.arange(0, 4 * J, gl.SliceLayout(0, gl.SliceLayout(1, w_l)))
    xz = gl.arange(0, KW, gl.SliceLayout(1, gl.SliceLayout(2, x_l)))
    xm = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(2, x_l)))[None, :, None]
    xk = gl.arange(0, 32 * J, gl.SliceLayout(0, gl.SliceLayout(1, x_l)))[None, None, :]
    x_start = (xz * per_slice)[:, None, None]
    x_ptrs = x_ptr + (xm.to(gl.int64) * x_stride + (x_start * (32 * J) + xk))
    x_mask = xm < M
    sz = gl.arange(0, KW, gl.SliceLayout(1, gl.SliceLayout(2, s_l)))
    sn = gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, s_l)))
    si = gl.arange(0, NS, gl.SliceLayout(0, gl.SliceLayout(1, s_l)))[None, None, :]

    place = (wn, (wz * per_slice)[:, None, None], ww[None, None, :], sn, (sz * per_slice)[:, None, None], si)
    addresses = (w_ptr.cast(gl.pointer_type(gl.int32), bitcast=True), absmax_8bit if NESTED else absmax)
    sizes = (N, row_words, row_blocks, groups)
    result = (bias_ptr, out_ptr, M, N)
    second = (absmax, absmax_code, gl.load(absmax_offset) if NESTED else 0.0)

    tile = gl.program_id(0)
    mine = (tiles - tile + programs - 1) // programs
    last = tile + (mine - 1) * programs
    first = _fetch(tile, 0, place, addresses, sizes, BN, J, U, CHAIN, BLOCK_GROUPS)
    then_tile, then = _next(tile, 0, iterations, programs, last)
    other = _fetch(then_tile, then, place, addresses, sizes, BN, J, U, CHAIN, BLOCK_GROUPS)
    lanes = ((wn % 8)[None, :, None] * 4 + (ww // J)[None, None, :]) * 4 + _fill_pair_table(pairs, KW * NW)
    lanes = (lanes,)
    zero = gl.zeros((KW, BN, BM), gl.float32, acc_l)
    acc = zero
    now = 0
    for i in range(0, mine * iterations, 2):
        xs = _load_activations(x_ptrs, x_mask, x_start, now * U, groups, J, U, True)
        ss = _scales_of(first[2], first[1], second, NESTED)
        acc = _accumulate(acc, first[0], xs, ss, lanes, BN, BM, J, NS, CHAIN, KW)
        then_tile, then = _next(then_tile, then, iterations, programs, last)
        first = _fetch(then_tile, then, place, addresses, sizes, BN, J, U, CHAIN, BLOCK_GROUPS)
        now += 1
        if now == iterations:
            _finish(acc, tile, result, BN, BM, BIAS)
            acc = zero
            now = 0
            tile += programs
        if i + 1 < mine * iterations:
            xs = _load_activations(x_ptrs, x_mask, x_start, now * U, groups, J, U, True)
            ss = _scales_of(other[2], other[1], second, NESTED)
            acc = _accumulate(acc, other[0], xs, ss, lanes, BN, BM, J, NS, CHAIN, KW)
            then_tile, then = _next(then_tile, then, iterations, programs, last)
            other = _fetch(then_tile, then, place, addresses, sizes, BN, J, U, CHAIN, BLOCK_GROUPS)
            now += 1
            if now == iterations:
                _finish(acc, tile, result, BN, BM, BIAS)
                acc = zero
                now = 0
                tile += programs
