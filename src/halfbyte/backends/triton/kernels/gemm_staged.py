"""The 4-bit product for up to 64 rows of activations, in Gluon, with the weight staged in shared memory (sm_80 and
later).

As gemm_small_batch, but the packed rows are copied ahead into a ring of shared buffers, 128 contiguous bytes of a row
at a
time: whole lines instead of single sectors on their way through the caches. x goes the same way.
Reads are free of bank conflicts because pieces are swizzled by row.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from halfbyte.backends.triton.kernels.gemm_small_batch import (
    _activation_layout,
    _block_index,
    _load_scales,
    _scale_layout,
    _split_scales,
    _word_layout,
)
from halfbyte.backends.triton.kernels.pair_table import _decode_words, _fill_pair_table

__all__ = ["_gemm_4bit_staged_kernel"]

# Triton 3.9 renamed the copy; the arguments used here kept their places.
_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.constexpr_function
def _copy_layout(KW, NW, width, size):
    """How threads share the copy of rows of ``width`` elements of ``size`` bytes: 16 bytes each, along the row
    first."""
    along = min(32, width * size // 16)
    return gl.BlockedLayout([1, 1, 16 // size], [1, 32 // along, along], [KW, NW, 1], [2, 1, 0])


@gluon.constexpr_function
def _ring_layout(J, U):
    """Shared layout of packed rows of 4*J*U words: the words of a group stay together, groups move with the row."""
    return gl.SwizzledSharedLayout(4 * J, max(1, 128 // (16 * J * U)), U, [2, 1, 0])


@gluon.jit
def _copy_iteration(
    w_ring, w_ptrs, w_start, w_columns, x_ring, x_ptrs, x_rows, x_start, x_columns, stage, g, groups, per_slice,
    J: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Start the copies of the iteration from group ``g`` on; past the end of the slice an empty group of copies."""
    if g < per_slice:
        if EVEN:
            _copy(w_ring.index(stage), w_ptrs + g * (4 * J))
        else:
            inside = (w_start + g) * (4 * J) + w_columns < groups * (4 * J)
            _copy(w_ring.index(stage), w_ptrs + g * (4 * J), mask=inside)
        inside = x_rows
        if not EVEN:
            inside = inside & ((x_start + g) * (32 * J) + x_columns < groups * (32 * J))
        _copy(x_ring.index(stage), x_ptrs + g * (32 * J), mask=inside)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["M"])
def _gemm_4bit_staged_kernel(
    w_ptr, x_ptr, absmax, absmax_8bit, absmax_code, absmax_offset, bias_ptr, out_ptr, pairs,
    h0, h1, h2, h3, l0, l1, l2, l3,
    M, N, row_words, row_blocks, x_stride, groups, per_slice,
    BN: gl.constexpr, BM: gl.constexpr, J: gl.constexpr, U: gl.constexpr, CHAIN: gl.constexpr,
    BLOCK_GROUPS: gl.constexpr, KW: gl.constexpr, NW: gl.constexpr, SPLIT: gl.constexpr, EVEN: gl.constexpr,
    ALIGNED: gl.constexpr, NESTED: gl.constexpr, BIAS: gl.constexpr, TABLE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """``out[m, n] = sum_k x[m, k] * level(w[n, k]) * absmax + bias[n]`` for one tile of BN rows of the weight.

    A group is 32*J columns. Grid: (tiles of BN, SPLIT, tiles of BM). ``per_slice`` groups, a multiple of U, go to each
    of the
    SPLIT*KW slices of K. CHAIN groups share one scale within an iteration of U groups; BLOCK_GROUPS groups make one
    block. ``row_blocks`` is the number of blocks in a row if blocks never straddle rows (ALIGNED), else the number of
    groups in a row. STAGES iterations are in shared memory or under way. With SPLIT > 1 the fp32 sums of every split go
    to ``out_ptr`` [SPLIT, M, N].
    """
    NS: gl.constexpr = U // CHAIN
    TILE: gl.constexpr = 16 if BM > 16 else BM
    TILES: gl.constexpr = BM // TILE
    DT: gl.constexpr = x_ptr.dtype.element_ty
    acc_l: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[KW, NW, 1], instr_shape=[1, 16, 8])
    a_l: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc_l, k_width=2)
    b_l: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=acc_l, k_width=2)
    w_l: gl.constexpr = _word_layout(KW, NW, BN, J)
    s_l: gl.constexpr = _scale_layout(KW, NW, BN, NS)
    wc_l: gl.constexpr = _copy_layout(KW, NW, 4 * J * U, 4)
    x_l: gl.constexpr = _activation_layout(KW, NW, TILE, J)
    xc_l: gl.constexpr = _copy_layout(KW, NW, 32 * J * U, 2)

    first = gl.program_id(0) * BN
    piece = gl.program_id(1) * KW

    wz = gl.arange(0, KW, gl.SliceLayout(1, gl.SliceLayout(2, wc_l)))
    wn = gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, wc_l)))
    ww = gl.arange(0, 4 * J * U, gl.SliceLayout(0, gl.SliceLayout(1, wc_l)))[None, None, :]
    wn = gl.minimum(first + wn, N - 1)
    w_start = ((piece + wz) * per_slice)[:, None, None]
    w_ptrs = w_ptr.cast(gl.pointer_type(gl.int32), bitcast=True) + (
        (wn * row_words)[None, :, None] + w_start * (4 * J) + ww
    )

    w_columns = ww + (wn * 0)[None, :, None]

    xz = gl.arange(0, KW, gl.SliceLayout(1, gl.SliceLayout(2, xc_l)))
    xm = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(2, xc_l)))[None, :, None]
    xk = gl.arange(0, 32 * J * U, gl.SliceLayout(0, gl.SliceLayout(1, xc_l)))[None, None, :]
    x_start = ((piece + xz) * per_slice)[:, None, None]
    xm = gl.program_id(2) * BM + xm
    x_rows = (xm < M) & (xk >= 0) & (xz >= 0)[:, None, None]
    xm = gl.minimum(xm, M - 1)
    x_ptrs = x_ptr + (xm.to(gl.int64) * x_stride + (x_start * (32 * J) + xk))
    x_columns = xk + xm * 0

    sz = gl.arange(0, KW, gl.SliceLayout(1, gl.SliceLayout(2, s_l)))
    sn = gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, s_l)))
    si = gl.arange(0, NS, gl.SliceLayout(0, gl.SliceLayout(1, s_l)))[None, None, :]
    sn = gl.minimum(first + sn, N - 1)
    s_start = ((piece + sz) * per_slice)[:, None, None]
    s_row = ((sn if ALIGNED else sn.to(gl.int64)) * row_blocks)[None, :, None]
    scales = absmax_8bit if NESTED else absmax
    if NESTED:
        offset = gl.load(absmax_offset)

    w_ring = gl.allocate_shared_memory(gl.int32, [STAGES, KW, BN, 4 * J * U], _ring_layout(J, U))
    x_ring = gl.allocate_shared_memory(
        DT, [STAGES, KW, BM, 32 * J * U], gl.SwizzledSharedLayout(8, 1, 4 * J, [2, 1, 0])
    )
    for stage in gl.static_range(STAGES - 1):
        _copy_iteration(
            w_ring, w_ptrs, w_start, w_columns, x_ring, x_ptrs, x_rows, x_start, x_columns, stage, stage * U, groups,
            per_slice,
            J, EVEN,
        )  # fmt: skip
    index = _block_index(s_row, s_start, 0, si, CHAIN, BLOCK_GROUPS, ALIGNED)
    q = _load_scales(scales, index, s_start, 0, si, groups, CHAIN, EVEN)
    ahead = gl.minimum(U, per_slice - U)
    index_next = _block_index(s_row, s_start, ahead, si, CHAIN, BLOCK_GROUPS, ALIGNED)
    q_next = _load_scales(scales, index_next, s_start, ahead, si, groups, CHAIN, EVEN)

    fn = gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, w_l)))[None, :, None]
    fw = gl.arange(0, 4 * J, gl.SliceLayout(0, gl.SliceLayout(1, w_l)))[None, None, :]
    if TABLE:
        decoding = ((((fn % 8) * 4 + fw // J) * 4 + _fill_pair_table(pairs, KW * NW)),)
    else:
        decoding = (h0, h1, h2, h3, l0, l1, l2, l3)
    zero = gl.zeros((KW, BN, TILE), gl.float32, acc_l)
    accs = ()
    for _ in gl.static_range(TILES):
        accs = accs + (zero,)
    stage = 0
    for g in range(0, per_slice, U):
        async_copy.wait_group(STAGES - 2)
        _barrier()
        fill = stage + STAGES - 1
        fill = gl.where(fill >= STAGES, fill - STAGES, fill)
        _copy_iteration(
            w_ring, w_ptrs, w_start, w_columns, x_ring, x_ptrs, x_rows, x_start, x_columns, fill, g + (STAGES - 1) * U,
            groups,
            per_slice, J, EVEN,
        )  # fmt: skip
        # The last iterations load the last scales again: they are in the cache, and the loop stays free of branches.
        ahead = gl.minimum(g + 2 * U, per_slice - U)
        index_after = _block_index(s_row, s_start, ahead, si, CHAIN, BLOCK_GROUPS, ALIGNED)
        q_after = _load_scales(scales, index_after, s_start, ahead, si, groups, CHAIN, EVEN)
        if NESTED:
            s = gl.load(absmax_code + q.to(gl.int32)) * gl.load(absmax + index // 256) + offset
        else:
            s = q
        ss = _split_scales(s)
        w_stage = w_ring.index(stage)
        for i in gl.static_range(NS):
            operands = ()
            for c in gl.static_range(CHAIN):
                words = w_stage.slice((i * CHAIN + c) * (4 * J), 4 * J, dim=2).load(w_l)
                levels = _decode_words(words, decoding, DT, TABLE).reshape((KW, BN, 4, J, 2, 2, 2))
                levels = levels.permute((0, 1, 3, 5, 6, 2, 4)).reshape((KW, BN, 32 * J))
                operands = operands + (gl.convert_layout(levels, a_l, assert_trivial=True),)
            scale = gl.convert_layout(ss[i], gl.SliceLayout(2, acc_l), assert_trivial=True)[:, :, None]
            done = ()
            for t in gl.static_range(TILES):
                part = zero
                for c in gl.static_range(CHAIN):
                    tile = x_ring.index(stage).slice(t * TILE, TILE, dim=1)
                    X = tile.slice((i * CHAIN + c) * (32 * J), 32 * J, dim=2).load(x_l)
                    X = X.reshape((KW, TILE, 4, J, 2, 2, 2)).permute((0, 3, 4, 5, 2, 6, 1))
                    B = gl.convert_layout(X.reshape((KW, 32 * J, TILE)), b_l, assert_trivial=True)
                    part = mma_v2(operands[c], B, part)
                done = done + (accs[t] + part * scale,)
            accs = done
        q = q_next
        index = index_next
        q_next = q_after
        index_next = index_after
        stage = gl.where(stage + 1 >= STAGES, 0, stage + 1)
    async_copy.wait_group(0)

    o_l: gl.constexpr = gl.SliceLayout(0, acc_l)
    n = first + gl.arange(0, BN, gl.SliceLayout(1, o_l))
    if BIAS:
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    for t in gl.static_range(TILES):
        total = gl.sum(accs[t], axis=0)
        m = gl.program_id(2) * BM + t * TILE + gl.arange(0, TILE, gl.SliceLayout(0, o_l))
        keep = (n < N)[:, None] & (m < M)[None, :]
        if SPLIT > 1:
            out_ptrs = out_ptr + (gl.program_id(1) * M + m[None, :]) * N + n[:, None]
            gl.store(out_ptrs, total, mask=keep)
        else:
            if BIAS:
                total += bias
            gl.store(out_ptr + m[None, :] * N + n[:, None], total.to(out_ptr.dtype.element_ty), mask=keep)
