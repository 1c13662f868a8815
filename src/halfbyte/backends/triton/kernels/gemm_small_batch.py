"""The 4-bit product for up to 16 rows of activations, in Gluon (sm_80 and later): codes become MMA operands directly.

The weight is the M side of the MMA (``out.T = W @ x.T``), so a small batch costs one or two n-tiles. A dot product does
not care about the order of its terms, so lane ``t`` of a quad calls the codes that it loaded contiguously its own
columns of the MMA fragment, and takes the same columns of ``x``: with ``J`` words a lane, logical column
``(j, c, h, t, e)`` of a group is physical column ``8*J*t + 8*j + 4*c + 2*h + e``. Nothing is shuffled, and neither
weight nor activation passes through shared memory. Scales are applied to the fp32 sums of a group, one FMA per
accumulator and block. ``KW`` warps share the K axis as the batch axis of a three-dimensional MMA; their sums meet once,
at the end, in a fixed order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from halfbyte.backends.triton.kernels.pair_table import _decode_words, _fill_pair_table

__all__ = ["_gemm_4bit_small_batch_kernel"]


@gluon.constexpr_function
def _bits(count, step, axis):
    """Bases of a linear layout: ``step``, ``2*step``, ... along ``axis`` for ``count`` (a power of two) positions."""
    bases = []
    while count > 1:
        base = [0, 0, 0]
        base[axis] = step
        bases.append(base)
        step *= 2
        count //= 2
    return bases


@gluon.constexpr_function
def _sums_layout(KW, NW):
    """Where the sums [KW, BN, BM] live."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[KW, NW, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def _word_layout(KW, NW, BN, J):
    """Where the 32-bit words of a weight tile [KW, BN, 4*J] live: J neighbours a lane, rows as in an MMA A fragment."""
    return gl.DistributedLinearLayout(
        reg_bases=_bits(J, 1, 2) + [[0, 8, 0]] + _bits(BN // (16 * NW), 16 * NW, 1),
        lane_bases=_bits(4, J, 2) + _bits(8, 1, 1),
        warp_bases=_bits(NW, 16, 1) + _bits(KW, 1, 0),
        block_bases=[],
        shape=[KW, BN, 4 * J],
    )


@gluon.constexpr_function
def _activation_layout(KW, NW, BM, J):
    """Where x [KW, BM, 32*J] lives: 8*J neighbours a lane, the same columns as that lane's codes."""
    return gl.DistributedLinearLayout(
        reg_bases=_bits(8 * J, 1, 2) + _bits(BM // 8, 8, 1),
        lane_bases=_bits(4, 8 * J, 2) + _bits(8, 1, 1),
        warp_bases=[[0, 0, 0]] * len(_bits(NW, 1, 0)) + _bits(KW, 1, 0),
        block_bases=[],
        shape=[KW, BM, 32 * J],
    )


@gluon.constexpr_function
def _scale_layout(KW, NW, BN, NS):
    """Where scales [KW, BN, NS] live: every lane holds all NS of its rows."""
    return gl.DistributedLinearLayout(
        reg_bases=_bits(NS, 1, 2) + [[0, 8, 0]] + _bits(BN // (16 * NW), 16 * NW, 1),
        lane_bases=[[0, 0, 0], [0, 0, 0]] + _bits(8, 1, 1),
        warp_bases=_bits(NW, 16, 1) + _bits(KW, 1, 0),
        block_bases=[],
        shape=[KW, BN, NS],
    )


@gluon.constexpr_function
def _without_last(shape):
    return list(shape[:-1])


@gluon.constexpr_function
def _last_in_pairs(shape):
    return [*shape[:-1], shape[-1] // 2, 2]


@gluon.jit
def _split_scales(s):
    """The columns (1, 2 or 4) of the last axis of ``s``, a tuple."""
    NS: gl.constexpr = s.shape[-1]
    if NS == 1:
        return (s.reshape(_without_last(s.shape)),)
    elif NS == 2:
        s0, s1 = s.split()
        return (s0, s1)
    else:
        even, odd = s.reshape(_last_in_pairs(s.shape)).split()
        s0, s2 = even.split()
        s1, s3 = odd.split()
        return (s0, s1, s2, s3)


@gluon.jit
def _load_words(w_ptrs, w_start, g, groups, J: gl.constexpr, U: gl.constexpr, EVEN: gl.constexpr):
    """U weight tiles from group ``g`` of every slice on."""
    ws = ()
    for u in gl.static_range(U):
        if EVEN:
            ws = ws + (gl.load(w_ptrs + (g + u) * (4 * J)),)
        else:
            ws = ws + (gl.load(w_ptrs + (g + u) * (4 * J), mask=w_start + (g + u) < groups, other=0),)
    return ws


@gluon.jit
def _load_activations(x_ptrs, x_mask, x_start, g, groups, J: gl.constexpr, U: gl.constexpr, EVEN: gl.constexpr):
    """U activation tiles from group ``g`` of every slice on; zeros past the batch and past K."""
    xs = ()
    for u in gl.static_range(U):
        if EVEN:
            xs = xs + (gl.load(x_ptrs + (g + u) * (32 * J), mask=x_mask, other=0.0),)
        else:
            inside = x_mask & (x_start + (g + u) < groups)
            xs = xs + (gl.load(x_ptrs + (g + u) * (32 * J), mask=inside, other=0.0),)
    return xs


@gluon.jit
def _block_index(s_row, s_start, g, si, CHAIN: gl.constexpr, BLOCK_GROUPS: gl.constexpr, ALIGNED: gl.constexpr):
    """Numbers of the blocks that an iteration from group ``g`` on needs, [KW, BN, NS]."""
    if ALIGNED:
        return s_row + ((s_start + g) // BLOCK_GROUPS + si)
    else:
        return (s_row + (s_start + (g + si))) // BLOCK_GROUPS


@gluon.jit
def _load_scales(scales, index, s_start, g, si, groups, CHAIN: gl.constexpr, EVEN: gl.constexpr):
    """absmax, or its 8-bit codes, of blocks ``index``; zero past K."""
    if EVEN:
        return gl.load(scales + index)
    else:
        return gl.load(scales + index, mask=s_start + (g + si * CHAIN) < groups, other=0)


@gluon.jit
def _accumulate(
    acc,
    ws,
    xs,
    ss,
    lanes,
    BN: gl.constexpr,
    BM: gl.constexpr,
    J: gl.constexpr,
    NS: gl.constexpr,
    CHAIN: gl.constexpr,
    KW: gl.constexpr,
):
    """``acc`` plus the products of U = NS*CHAIN groups: MMA over the levels, then one scaled fp32 add per block."""
    acc_l: gl.constexpr = acc.type.layout
    a_l: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc_l, k_width=2)
    b_l: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=acc_l, k_width=2)
    DT: gl.constexpr = xs[0].dtype
    zero = gl.zeros((KW, BN, BM), gl.float32, acc_l)
    for i in gl.static_range(NS):
        part = zero
        for c in gl.static_range(CHAIN):
            levels = _decode_words(ws[i * CHAIN + c], lanes, DT, True).reshape((KW, BN, 4, J, 2, 2, 2))
            levels = levels.permute((0, 1, 3, 5, 6, 2, 4)).reshape((KW, BN, 32 * J))
            A = gl.convert_layout(levels, a_l, assert_trivial=True)
            X = xs[i * CHAIN + c].reshape((KW, BM, 4, J, 2, 2, 2)).permute((0, 3, 4, 5, 2, 6, 1))
            B = gl.convert_layout(X.reshape((KW, 32 * J, BM)), b_l, assert_trivial=True)
            part = mma_v2(A, B, part)
        scale = gl.convert_layout(ss[i], gl.SliceLayout(2, acc_l), assert_trivial=True)
        acc += part * scale[:, :, None]
    return acc


@gluon.jit
def _scales_of(q, index, nested, NESTED: gl.constexpr):
    """Scales, one tensor for each block of an iteration, of what was loaded for blocks ``index``."""
    absmax, absmax_code, offset = nested
    if NESTED:
        s = gl.load(absmax_code + q.to(gl.int32)) * gl.load(absmax + index // 256) + offset
    else:
        s = q
    return _split_scales(s)


@gluon.jit
def _multiply(
    weight, activation, blocks, nested, pairs, groups, per_slice, acc_l: gl.constexpr,
    BN: gl.constexpr, BM: gl.constexpr, J: gl.constexpr, U: gl.constexpr, CHAIN: gl.constexpr,
    BLOCK_GROUPS: gl.constexpr, KW: gl.constexpr, NW: gl.constexpr, EVEN: gl.constexpr, ALIGNED: gl.constexpr,
    NESTED: gl.constexpr, AHEAD: gl.constexpr, FILLED: gl.constexpr = False,
):  # fmt: skip
    """Sums [KW, BN, BM] of all groups of every slice of K.

    ``weight``: addresses of the words of the slice's first group, its number, and the lane's place in the decode table;
    ``activation``: addresses, mask, number; ``blocks``: absmax or its codes, and of what :func:`_block_index` is made;
    ``nested``: absmax of the codes, their map and the offset's address; ``pairs``: the pairs' address or, where FILLED,
    what :func:`_fill_pair_table` returned. Other constants are the kernel's.
    """
    NS: gl.constexpr = U // CHAIN
    w_ptrs, w_start, lane = weight
    x_ptrs, x_mask, x_start = activation
    scales, s_row, s_start, si = blocks
    absmax, absmax_code, absmax_offset = nested
    offset = gl.load(absmax_offset) if NESTED else 0.0
    second = (absmax, absmax_code, offset)
    acc = gl.zeros((KW, BN, BM), gl.float32, acc_l)
    if AHEAD > 0:
        ws = _load_words(w_ptrs, w_start, 0, groups, J, U, EVEN)
        index = _block_index(s_row, s_start, 0, si, CHAIN, BLOCK_GROUPS, ALIGNED)
        q = _load_scales(scales, index, s_start, 0, si, groups, CHAIN, EVEN)
        if AHEAD > 1:
            xs = _load_activations(x_ptrs, x_mask, x_start, 0, groups, J, U, EVEN)
        if FILLED:
            lanes = (lane * 4 + pairs,)
        else:
            lanes = (lane * 4 + _fill_pair_table(pairs, KW * NW),)
        for g in range(U, per_slice, U):
            ws_next = _load_words(w_ptrs, w_start, g, groups, J, U, EVEN)
            index_next = _block_index(s_row, s_start, g, si, CHAIN, BLOCK_GROUPS, ALIGNED)
            q_next = _load_scales(scales, index_next, s_start, g, si, groups, CHAIN, EVEN)
            if AHEAD > 1:
                xs_next = _load_activations(x_ptrs, x_mask, x_start, g, groups, J, U, EVEN)
            else:
                xs = _load_activations(x_ptrs, x_mask, x_start, g - U, groups, J, U, EVEN)
            ss = _scales_of(q, index, second, NESTED)
            acc = _accumulate(acc, ws, xs, ss, lanes, BN, BM, J, NS, CHAIN, KW)
            ws = ws_next
            q = q_next
            index = index_next
            if AHEAD > 1:
                xs = xs_next
        if AHEAD == 1:
            xs = _load_activations(x_ptrs, x_mask, x_start, per_slice - U, groups, J, U, EVEN)
        ss = _scales_of(q, index, second, NESTED)
        acc = _accumulate(acc, ws, xs, ss, lanes, BN, BM, J, NS, CHAIN, KW)
    else:
        if FILLED:
            lanes = (lane * 4 + pairs,)
        else:
            lanes = (lane * 4 + _fill_pair_table(pairs, KW * NW),)
        for g in range(0, per_slice, U):
            ws = _load_words(w_ptrs, w_start, g, groups, J, U, EVEN)
            index = _block_index(s_row, s_start, g, si, CHAIN, BLOCK_GROUPS, ALIGNED)
            q = _load_scales(scales, index, s_start, g, si, groups, CHAIN, EVEN)
            xs = _load_activations(x_ptrs, x_mask, x_start, g, groups, J, U, EVEN)
            ss = _scales_of(q, index, second, NESTED)
            acc = _accumulate(acc, ws, xs, ss, lanes, BN, BM, J, NS, CHAIN, KW)
    return acc


@gluon.jit
def _fetch(
    weight, activation, blocks, g, groups,
    J: gl.constexpr, U: gl.constexpr, CHAIN: gl.constexpr, BLOCK_GROUPS: gl.constexpr, EVEN: gl.constexpr,
    ALIGNED: gl.constexpr, WITH_X: gl.constexpr,
):  # fmt: skip
    """Words, block numbers, scales or their codes and, WITH_X, activations of the iteration from group ``g`` on."""
    w_ptrs, w_start, _lane = weight
    x_ptrs, x_mask, x_start = activation
    scales, s_row, s_start, si = blocks
    ws = _load_words(w_ptrs, w_start, g, groups, J, U, EVEN)
    index = _block_index(s_row, s_start, g, si, CHAIN, BLOCK_GROUPS, ALIGNED)
    q = _load_scales(scales, index, s_start, g, si, groups, CHAIN, EVEN)
    if WITH_X:
        return (ws, index, q, _load_activations(x_ptrs, x_mask, x_start, g, groups, J, U, EVEN))
    else:
        return (ws, index, q, ())


@gluon.jit
def _multiply_in_turns(
    weight, activation, blocks, nested, pairs, groups, per_slice, acc_l: gl.constexpr,
    BN: gl.constexpr, BM: gl.constexpr, J: gl.constexpr, U: gl.constexpr, CHAIN: gl.constexpr,
    BLOCK_GROUPS: gl.constexpr, KW: gl.constexpr, NW: gl.constexpr, EVEN: gl.constexpr, ALIGNED: gl.constexpr,
    NESTED: gl.constexpr, WITH_X: gl.constexpr,
):  # fmt: skip
    """As :func:`_multiply` for an even number of iterations, two of which have registers of their own: to pass what was
    loaded from one to the next would be to wait for it."""
    NS: gl.constexpr = U // CHAIN
    _w_ptrs, _w_start, lane = weight
    x_ptrs, x_mask, x_start = activation
    absmax, absmax_code, absmax_offset = nested
    second = (absmax, absmax_code, gl.load(absmax_offset) if NESTED else 0.0)
    acc = gl.zeros((KW, BN, BM), gl.float32, acc_l)
    a = _fetch(weight, activation, blocks, 0, groups, J, U, CHAIN, BLOCK_GROUPS, EVEN, ALIGNED, WITH_X)
    b = _fetch(weight, activation, blocks, U, groups, J, U, CHAIN, BLOCK_GROUPS, EVEN, ALIGNED, WITH_X)
    lanes = (lane * 4 + _fill_pair_table(pairs, KW * NW),)
    for g in range(2 * U, per_slice, 2 * U):
        xs = a[3] if WITH_X else _load_activations(x_ptrs, x_mask, x_start, g - 2 * U, groups, J, U, EVEN)
        acc = _accumulate(acc, a[0], xs, _scales_of(a[2], a[1], second, NESTED), lanes, BN, BM, J, NS, CHAIN, KW)
        a = _fetch(weight, activation, blocks, g, groups, J, U, CHAIN, BLOCK_GROUPS, EVEN, ALIGNED, WITH_X)
        xs = b[3] if WITH_X else _load_activations(x_ptrs, x_mask, x_start, g - U, groups, J, U, EVEN)
        acc = _accumulate(acc, b[0], xs, _scales_of(b[2], b[1], second, NESTED), lanes, BN, BM, J, NS, CHAIN, KW)
        b = _fetch(weight, activation, blocks, g + U, groups, J, U, CHAIN, BLOCK_GROUPS, EVEN, ALIGNED, WITH_X)
    xs = a[3] if WITH_X else _load_activations(x_ptrs, x_mask, x_start, per_slice - 2 * U, groups, J, U, EVEN)
    acc = _accumulate(acc, a[0], xs, _scales_of(a[2], a[1], second, NESTED), lanes, BN, BM, J, NS, CHAIN, KW)
    xs = b[3] if WITH_X else _load_activations(x_ptrs, x_mask, x_start, per_slice - U, groups, J, U, EVEN)
    return _accumulate(acc, b[0], xs, _scales_of(b[2], b[1], second, NESTED), lanes, BN, BM, J, NS, CHAIN, KW)


@gluon.jit(do_not_specialize=["M"])
def _gemm_4bit_small_batch_kernel(
    w_ptr, x_ptr, absmax, absmax_8bit, absmax_code, absmax_offset, bias_ptr, out_ptr, pairs,
    M, N, row_words, row_blocks, x_stride, groups, per_slice,
    BN: gl.constexpr, BM: gl.constexpr, J: gl.constexpr, U: gl.constexpr, CHAIN: gl.constexpr,
    BLOCK_GROUPS: gl.constexpr, KW: gl.constexpr, NW: gl.constexpr, SPLIT: gl.constexpr, EVEN: gl.constexpr,
    ALIGNED: gl.constexpr, NESTED: gl.constexpr, BIAS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """``out[m, n] = sum_k x[m, k] * level(w[n, k]) * absmax + bias[n]`` for one tile of BN rows of the weight.

    A group is 32*J columns. Grid: (tiles of BN, SPLIT). ``per_slice`` groups, a multiple of U, go to each of the
    SPLIT*KW slices of K. CHAIN groups share one scale within an iteration of U groups; BLOCK_GROUPS groups make one
    block. ``row_blocks`` is the number of blocks in a row if blocks never straddle rows (ALIGNED), else the number of
    groups in a row. AHEAD: 0 loads an iteration's operands when it needs them, 1 loads the weight and its scales one
    iteration ahead, 2 the activation too; 3 and 4 are 1 and 2 with two iterations in turn. With SPLIT > 1 the fp32 sums
    of every split go to ``out_ptr`` [SPLIT, M, N].
    """
    NS: gl.constexpr = U // CHAIN
    acc_l: gl.constexpr = _sums_layout(KW, NW)
    w_l: gl.constexpr = _word_layout(KW, NW, BN, J)
    x_l: gl.constexpr = _activation_layout(KW, NW, BM, J)
    s_l: gl.constexpr = _scale_layout(KW, NW, BN, NS)

    first = gl.program_id(0) * BN
    piece = gl.program_id(1) * KW

    wz = gl.arange(0, KW, gl.SliceLayout(1, gl.SliceLayout(2, w_l)))
    wn = gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, w_l)))
    ww = gl.arange(0, 4 * J, gl.SliceLayout(0, gl.SliceLayout(1, w_l)))
    wn_all = wn
    wn = gl.minimum(first + wn, N - 1)
    w_start = ((piece + wz) * per_slice)[:, None, None]
    w_ptrs = w_ptr.cast(gl.pointer_type(gl.int32), bitcast=True) + (
        (wn * row_words)[None, :, None] + w_start * (4 * J) + ww[None, None, :]
    )

    xz = gl.arange(0, KW, gl.SliceLayout(1, gl.SliceLayout(2, x_l)))
    xm = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(2, x_l)))[None, :, None]
    xk = gl.arange(0, 32 * J, gl.SliceLayout(0, gl.SliceLayout(1, x_l)))[None, None, :]
    x_start = ((piece + xz) * per_slice)[:, None, None]
    x_ptrs = x_ptr + (xm.to(gl.int64) * x_stride + (x_start * (32 * J) + xk))
    x_mask = xm < M

    sz = gl.arange(0, KW, gl.SliceLayout(1, gl.SliceLayout(2, s_l)))
    sn = gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, s_l)))
    si = gl.arange(0, NS, gl.SliceLayout(0, gl.SliceLayout(1, s_l)))[None, None, :]
    sn = gl.minimum(first + sn, N - 1)
    s_start = ((piece + sz) * per_slice)[:, None, None]
    s_row = ((sn if ALIGNED else sn.to(gl.int64)) * row_blocks)[None, :, None]
    scales = absmax_8bit if NESTED else absmax
    lane = (wn_all % 8)[None, :, None] * 4 + (ww // J)[None, None, :]
    w, x = (w_ptrs, w_start, lane), (x_ptrs, x_mask, x_start)
    block, nested = (scales, s_row, s_start, si), (absmax, absmax_code, absmax_offset)
    if AHEAD > 2:
        acc = _multiply_in_turns(
            w, x, block, nested, pairs, groups, per_slice, acc_l,
            BN, BM, J, U, CHAIN, BLOCK_GROUPS, KW, NW, EVEN, ALIGNED, NESTED, AHEAD == 4,
        )  # fmt: skip
    else:
        acc = _multiply(
            w, x, block, nested, pairs, groups, per_slice, acc_l,
            BN, BM, J, U, CHAIN, BLOCK_GROUPS, KW, NW, EVEN, ALIGNED, NESTED, AHEAD,
        )  # fmt: skip

    total = gl.sum(acc, axis=0)
    o_l: gl.constexpr = gl.SliceLayout(0, acc_l)
    n = first + gl.arange(0, BN, gl.SliceLayout(1, o_l))
    m = gl.arange(0, BM, gl.SliceLayout(0, o_l))
    keep = (n < N)[:, None] & (m < M)[None, :]
    if SPLIT > 1:
        out_ptrs = out_ptr + (gl.program_id(1) * M + m[None, :]) * N + n[:, None]
        gl.store(out_ptrs, total, mask=keep)
    else:
        if BIAS:
            total += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
        gl.store(out_ptr + m[None, :] * N + n[:, None], total.to(out_ptr.dtype.element_ty), mask=keep)
