"""The 4-bit product for 17 rows of activations and more on Hopper, in Gluon: wgmma with the decoded weight in
registers.

As gemm_staged, with the activation read by the tensor cores straight from shared memory. There it lies in the order of
columns that the lanes' codes have (see gemm_small_batch), which the copy brings about two columns at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from halfbyte.backends.triton.kernels.gemm_small_batch import _load_scales, _split_scales
from halfbyte.backends.triton.kernels.pair_table import _decode_words, _fill_pair_table

__all__ = ["_gemm_4bit_warpgroup_kernel"]

# Triton 3.9 renamed the copy; the arguments used here kept their places.
_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.constexpr_function
def _rows(count, step):
    bases = []
    while count > 1:
        bases.append([step, 0])
        step *= 2
        count //= 2
    return bases


@gluon.constexpr_function
def _columns(count):
    bases = []
    step = 1
    while step < count:
        bases.append([0, step])
        step *= 2
    return bases


@gluon.constexpr_function
def _row_layout(NW, BN, columns, shared):
    """Tiles over the rows of wgmma accumulators: [BN, columns] that a quad's lanes share, or [BN, 4*columns] it
    splits."""
    return gl.DistributedLinearLayout(
        reg_bases=_columns(columns) + [[8, 0]] + _rows(BN // (16 * NW), 16 * NW),
        lane_bases=([[0, 0], [0, 0]] if shared else [[0, columns], [0, 2 * columns]]) + [[1, 0], [2, 0], [4, 0]],
        warp_bases=_rows(NW, 16),
        block_bases=[],
        shape=[BN, columns if shared else 4 * columns],
    )


@gluon.jit
def _copy_iteration(
    w_ring,
    w_ptrs,
    w_columns,
    x_ring,
    x_ptrs,
    x_rows,
    stage,
    start,
    g,
    groups,
    per_slice,
    U: gl.constexpr,
    EVEN: gl.constexpr,
):
    """Start the copies of the iteration from group ``g`` of the slice on; past its end an empty group of copies."""
    if g < per_slice:
        if EVEN:
            _copy(w_ring.index(stage), w_ptrs + g * 8)
        else:
            _copy(w_ring.index(stage), w_ptrs + g * 8, mask=(start + g) * 8 + w_columns < groups * 8)
        for u in gl.static_range(U):
            if EVEN:
                _copy(x_ring.index(stage * U + u), x_ptrs + (g + u) * 64)
            else:
                inside = start + g + u < groups
                _copy(x_ring.index(stage * U + u), x_ptrs + (g + u) * 64, mask=x_rows & inside)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["M"])
def _gemm_4bit_warpgroup_kernel(
    w_ptr, x_ptr, absmax, absmax_8bit, absmax_code, absmax_offset, bias_ptr, out_ptr, pairs,
    h0, h1, h2, h3, l0, l1, l2, l3,
    M, N, row_words, row_blocks, x_stride, groups, per_slice,
    BN: gl.constexpr, BM: gl.constexpr, U: gl.constexpr, CHAIN: gl.constexpr, BLOCK_GROUPS: gl.constexpr,
    NW: gl.constexpr, SPLIT: gl.constexpr, EVEN: gl.constexpr, NESTED: gl.constexpr, BIAS: gl.constexpr,
    TABLE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One tile of BN rows of the weight and BM rows of x; grid (tiles of BN, SPLIT, tiles of BM). Groups of 64 columns.

    Otherwise as _gemm_4bit_staged_kernel, for blocks of 64 and more that do not straddle rows.
    """
    NS: gl.constexpr = U // CHAIN
    OVERLAP: gl.constexpr = BM <= 64 and NS > 1
    DT: gl.constexpr = x_ptr.dtype.element_ty
    acc_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, BM, 16])
    a_l: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc_l, k_width=2)
    w_l: gl.constexpr = _row_layout(NW, BN, 2, False)
    s_l: gl.constexpr = _row_layout(NW, BN, NS, True)
    wc_l: gl.constexpr = gl.BlockedLayout([1, 4], [32 // (2 * U), 2 * U], [NW, 1], [1, 0])
    xc_l: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [NW, 1], [1, 0])

    first = gl.program_id(0) * BN
    start = gl.program_id(1) * per_slice
    batch = gl.program_id(2) * BM

    wn = gl.minimum(first + gl.arange(0, BN, gl.SliceLayout(1, wc_l)), N - 1)
    ww = gl.arange(0, 8 * U, gl.SliceLayout(0, wc_l))[None, :]
    w_ptrs = w_ptr.cast(gl.pointer_type(gl.int32), bitcast=True) + ((wn * row_words)[:, None] + start * 8 + ww)

    w_columns = ww + (wn * 0)[:, None]

    xm = gl.minimum(batch + gl.arange(0, BM, gl.SliceLayout(1, xc_l)), M - 1)
    xk = gl.arange(0, 64, gl.SliceLayout(0, xc_l))
    # Column (j, c, h, t, e) of the fragment is column (t, j, c, h, e) of x.
    xk = ((xk // 2) % 4) * 16 + (xk // 8) * 2 + xk % 2
    x_ptrs = x_ptr + (xm.to(gl.int64)[:, None] * x_stride + (start * 64 + xk)[None, :])
    x_rows = (xm >= 0)[:, None] & (xk >= 0)[None, :]

    sn = gl.minimum(first + gl.arange(0, BN, gl.SliceLayout(1, s_l)), N - 1)
    si = gl.arange(0, NS, gl.SliceLayout(0, s_l))[None, :]
    s_row = (sn * row_blocks)[:, None]
    scales = absmax_8bit if NESTED else absmax
    if NESTED:
        offset = gl.load(absmax_offset)

    w_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES, BN, 8 * U], gl.SwizzledSharedLayout(8, max(1, 4 // U), U, [1, 0])
    )
    x_ring = gl.allocate_shared_memory(
        DT, [STAGES * U, BM, 64], gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    )
    for stage in gl.static_range(STAGES - 1):
        _copy_iteration(
            w_ring, w_ptrs, w_columns, x_ring, x_ptrs, x_rows, stage, start, stage * U, groups, per_slice, U, EVEN
        )
    index = s_row + (start // BLOCK_GROUPS + si)
    q = _load_scales(scales, index, start, 0, si, groups, CHAIN, EVEN)
    ahead = gl.minimum(U, per_slice - U)
    index_next = s_row + ((start + ahead) // BLOCK_GROUPS + si)
    q_next = _load_scales(scales, index_next, start, ahead, si, groups, CHAIN, EVEN)

    fn = gl.arange(0, BN, gl.SliceLayout(1, w_l))[:, None]
    fw = gl.arange(0, 8, gl.SliceLayout(0, w_l))[None, :]
    if TABLE:
        decoding = ((((fn % 8) * 4 + fw // 2) * 4 + _fill_pair_table(pairs, NW)),)
    else:
        decoding = (h0, h1, h2, h3, l0, l1, l2, l3)
    zero = gl.zeros((BN, BM), gl.float32, acc_l)
    acc = zero
    stage = 0
    for g in range(0, per_slice, U):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        _barrier()
        fill = stage + STAGES - 1
        fill = gl.where(fill >= STAGES, fill - STAGES, fill)
        _copy_iteration(
            w_ring,
            w_ptrs,
            w_columns,
            x_ring,
            x_ptrs,
            x_rows,
            fill,
            start,
            g + (STAGES - 1) * U,
            groups,
            per_slice,
            U,
            EVEN,
        )
        # The last iterations load the last scales again: they are in the cache, and the loop stays free of branches.
        ahead = gl.minimum(g + 2 * U, per_slice - U)
        index_after = s_row + ((start + ahead) // BLOCK_GROUPS + si)
        q_after = _load_scales(scales, index_after, start, ahead, si, groups, CHAIN, EVEN)
        if NESTED:
            s = gl.load(absmax_code + q.to(gl.int32)) * gl.load(absmax + index // 256) + offset
        else:
            s = q
        ss = _split_scales(s)
        w_stage = w_ring.index(stage)
        waiting = ()
        for i in gl.static_range(NS):
            part = zero
            for c in gl.static_range(CHAIN):
                words = w_stage.slice((i * CHAIN + c) * 8, 8, dim=1).load(w_l)
                levels = _decode_words(words, decoding, DT, TABLE).reshape((BN, 4, 2, 2, 2, 2))
                levels = levels.permute((0, 2, 4, 5, 1, 3)).reshape((BN, 64))
                A = gl.convert_layout(levels, a_l, assert_trivial=True)
                B = x_ring.index(stage * U + (i * CHAIN + c)).permute((1, 0))
                part = warpgroup_mma(A, B, part, use_acc=c > 0, is_async=True)
                if c + 1 < CHAIN:
                    part = warpgroup_mma_wait(0, deps=(part,))
            if OVERLAP:
                if i > 0:
                    # The tensor cores work on this block while the one before is scaled and the next one decoded.
                    ready = warpgroup_mma_wait(1, deps=(waiting[0],))
                    scale = gl.convert_layout(ss[i - 1], gl.SliceLayout(1, acc_l), assert_trivial=True)
                    acc += ready * scale[:, None]
                waiting = (part,)
            else:
                part = warpgroup_mma_wait(0, deps=(part,))
                scale = gl.convert_layout(ss[i], gl.SliceLayout(1, acc_l), assert_trivial=True)
                acc += part * scale[:, None]
        if OVERLAP:
            ready = warpgroup_mma_wait(0, deps=(waiting[0],))
            scale = gl.convert_layout(ss[NS - 1], gl.SliceLayout(1, acc_l), assert_trivial=True)
            acc += ready * scale[:, None]
        q = q_next
        index = index_next
        q_next = q_after
        index_next = index_after
        stage = gl.where(stage + 1 >= STAGES, 0, stage + 1)
    async_copy.wait_group(0)

    n = first + gl.arange(0, BN, gl.SliceLayout(1, acc_l))
    m = batch + gl.arange(0, BM, gl.SliceLayout(0, acc_l))
    keep = (n < N)[:, None] & (m < M)[None, :]
    if SPLIT > 1:
        gl.store(out_ptr + (gl.program_id(1) * M + m[None, :]) * N + n[:, None], acc, mask=keep)
    else:
        if BIAS:
            acc += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
        gl.store(out_ptr + m[None, :] * N + n[:, None], acc.to(out_ptr.dtype.element_ty), mask=keep)
