"""The 4-bit product for more than a few rows on Hopper, in Gluon: some warps decode the weight into shared memory,
others multiply.

The copy engine brings packed words, G steps of 64 terms at a time, and the activation. A producer's thread decodes one
block of 64 weights (block_table): what lands in shared memory is the dequantized weight to the last bit. Consumer warps
do nothing but wgmma. Rings of barriers connect them.

Loads that run ahead must not end in registers that a loop passes on: to move a register is to wait for its load, and
the distance is lost. So words stay in shared memory until their step, and scales are loaded two groups of steps ahead.

Read along its rows the weight gives ``x @ weight.T``, read across them (ACROSS) ``grad @ weight``: the tensor cores
take the transposed tile as it is.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from halfbyte.backends.triton.kernels.block_table import _decode_block

__all__ = ["_gemm_4bit_decoded_kernel"]

# Triton 3.9 renamed the copy; the arguments used here kept their places.
_load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.constexpr_function
def _word_layout():
    """Words [128, 8] of blocks of 64 weights: a whole block a thread of four warps."""
    return gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])


@gluon.constexpr_function
def _packed_layout(ACROSS, G):
    """Words of G steps: those of a thread's blocks. [128, 8 G]: rows of the weight; ACROSS [64 G, 16]: G times 64 rows,
    two blocks of each."""
    rows = [[1, 0], [2, 0], [4, 0], [8, 0], [16, 0]]
    words = [[0, 1], [0, 2], [0, 4]]
    if ACROSS:
        steps = [[64, 0], [128, 0]][: 1 if G == 2 else 2]
        # Lanes hold 16 rows of both blocks, whose scales lie side by side.
        return gl.DistributedLinearLayout(words + steps, [*rows[:4], [0, 8]], [[16, 0], [32, 0]], [], [64 * G, 16])
    steps = [[0, 8], [0, 16]][: 1 if G == 2 else 2]
    return gl.DistributedLinearLayout(words + steps, rows, [[32, 0], [64, 0]], [], [128, 8 * G])


@gluon.jit
def _split_steps(packed, ACROSS: gl.constexpr, G: gl.constexpr):
    """Words [128, 8] of each of G steps, a tuple."""
    w_l: gl.constexpr = _word_layout()
    if G == 2:
        if ACROSS:
            words = packed.reshape([2, 4, 16, 2, 8]).permute((1, 3, 2, 4, 0)).reshape([128, 8, 2])
        else:
            words = packed.reshape([128, 2, 8]).permute((0, 2, 1))
        w0, w1 = words.split()
        return (gl.convert_layout(w0, w_l, assert_trivial=True), gl.convert_layout(w1, w_l, assert_trivial=True))
    else:
        if ACROSS:
            words = packed.reshape([4, 4, 16, 2, 8]).permute((1, 3, 2, 4, 0)).reshape([128, 8, 2, 2])
        else:
            words = packed.reshape([128, 4, 8]).permute((0, 2, 1)).reshape([128, 8, 2, 2])
        even, odd = words.split()
        w0, w2 = even.split()
        w1, w3 = odd.split()
        return (
            gl.convert_layout(w0, w_l, assert_trivial=True),
            gl.convert_layout(w1, w_l, assert_trivial=True),
            gl.convert_layout(w2, w_l, assert_trivial=True),
            gl.convert_layout(w3, w_l, assert_trivial=True),
        )


if hasattr(gl.shared_memory_descriptor, "_reinterpret"):

    @gluon.jit
    def _view(memory, DT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
        """The same shared memory as a tile [ROWS, COLUMNS]."""
        return memory._reinterpret(DT, [ROWS, COLUMNS], layout)

    @gluon.jit
    def _tiles(
        memory, DT: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr
    ):
        """The same shared memory, all of it (Triton 3.8 insists), as COUNT tiles [ROWS, COLUMNS]."""
        return memory._reinterpret(DT, [COUNT, ROWS, COLUMNS], layout)

else:  # renamed in Triton 3.7

    @gluon.jit
    def _view(memory, DT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
        """The same shared memory as a tile [ROWS, COLUMNS]."""
        return memory.reinterpret(DT, [ROWS, COLUMNS], layout)

    @gluon.jit
    def _tiles(
        memory, DT: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr
    ):
        """The same shared memory, all of it (Triton 3.8 insists), as COUNT tiles [ROWS, COLUMNS]."""
        return memory.reinterpret(DT, [COUNT, ROWS, COLUMNS], layout)


@gluon.jit
def _fetch_scales(
    i, scales, row, base, row_blocks, N, begin, steps,
    BLOCK: gl.constexpr, ACROSS: gl.constexpr, WHOLE: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    """absmax or its code, and the block's number, [128] each, of the G steps from ``i`` on, or of the last ones."""
    s_l: gl.constexpr = gl.SliceLayout(1, _word_layout())
    found = ()
    if WHOLE:
        g_l: gl.constexpr = gl.BlockedLayout([1, G], [32, 1], [4, 1], [1, 0])
        first = base + begin + gl.minimum(i, steps - G)
        start = gl.convert_layout(first, gl.SliceLayout(1, g_l), assert_trivial=True)
        loaded = gl.load(scales + (start[:, None] + gl.arange(0, G, gl.SliceLayout(0, g_l))[None, :]))
        if G == 2:
            q0, q1 = loaded.split()
            found = (
                (gl.convert_layout(q0, s_l, assert_trivial=True), first),
                (gl.convert_layout(q1, s_l, assert_trivial=True), first + 1),
            )
        else:
            even, odd = loaded.reshape([128, 2, 2]).split()
            q0, q2 = even.split()
            q1, q3 = odd.split()
            found = (
                (gl.convert_layout(q0, s_l, assert_trivial=True), first),
                (gl.convert_layout(q1, s_l, assert_trivial=True), first + 1),
                (gl.convert_layout(q2, s_l, assert_trivial=True), first + 2),
                (gl.convert_layout(q3, s_l, assert_trivial=True), first + 3),
            )
    else:
        for u in gl.static_range(G):
            if ACROSS:
                index = gl.minimum(row + (i + u) * 64, N - 1) * row_blocks + base
            else:
                index = base + (begin + gl.minimum(i + u, steps - 1)) * 64 // BLOCK
            found = found + ((gl.load(scales + index), index),)
    return found


@gluon.jit
def _scales_of(found, absmax, absmax_code, offset, NESTED: gl.constexpr, G: gl.constexpr):
    """The scales of a group of steps, a tuple."""
    scales = ()
    for u in gl.static_range(G):
        q, index = found[u]
        if NESTED:
            q = gl.load(absmax_code + q.to(gl.int32)) * gl.load(absmax + index // 256) + offset
        scales = scales + (q,)
    return scales


@gluon.jit
def _produce(
    source, rings, barriers, place,
    BM: gl.constexpr, BLOCK: gl.constexpr, ACROSS: gl.constexpr, NESTED: gl.constexpr, WHOLE: gl.constexpr,
    STAGES: gl.constexpr, G: gl.constexpr, PG: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Fill the rings: for every step of 64 terms the activation and the decoded weight.

    Producer WHO of PG takes every PG-th group of G steps.
    """
    w_desc, x_desc, absmax, absmax_8bit, absmax_code, absmax_offset, levels = source
    p_ring, w_ring, x_ring = rings
    packed, full, empty = barriers
    N, K, row_blocks, first, batch, begin, steps = place
    DT: gl.constexpr = x_ring.dtype
    p_l: gl.constexpr = _packed_layout(ACROSS, G)
    BYTES: gl.constexpr = 4096 * G
    block = gl.arange(0, 128, gl.SliceLayout(1, _word_layout()))
    if ACROSS:
        row = begin * 64 + block // 32 * 16 + block % 16
        base = gl.minimum(first + block // 16 % 2 * 64, K - 64) // BLOCK
    else:
        row = gl.minimum(first + block, N - 1)
        base = row * row_blocks
    scales = absmax_8bit if NESTED else absmax
    # Adding nothing is to wait for a load: else the loop waits wherever it uses this register, for later loads as well.
    offset = gl.load(absmax_offset) + 0.0 if NESTED else 0.0
    for group in gl.static_range(2):
        step = begin + (WHO + group * PG) * G
        mbarrier.expect(packed.index(WHO * 2 + group), BYTES)
        at = [step * 64, first // 8] if ACROSS else [first, step * 8]
        _load_tile(w_desc, at, packed.index(WHO * 2 + group), p_ring.index(WHO * 2 + group))
    found = _fetch_scales(WHO * G, scales, row, base, row_blocks, N, begin, steps, BLOCK, ACROSS, WHOLE, G)
    loaded = _scales_of(found, absmax, absmax_code, offset, NESTED, G)
    ahead = ()
    for u in gl.static_range(G):
        ahead = ahead + (loaded[u] + 0.0,)
    found = _fetch_scales((WHO + PG) * G, scales, row, base, row_blocks, N, begin, steps, BLOCK, ACROSS, WHOLE, G)
    stage = WHO * G
    phase = 1
    half = 0
    half_phase = 0
    for i in range(WHO * G, steps, PG * G):
        mbarrier.wait(packed.index(WHO * 2 + half), half_phase)
        words = _split_steps(p_ring.index(WHO * 2 + half).load(p_l), ACROSS, G)
        _barrier()
        mbarrier.expect(packed.index(WHO * 2 + half), BYTES)
        step = begin + i + 2 * PG * G
        at = [step * 64, first // 8] if ACROSS else [first, step * 8]
        _load_tile(w_desc, at, packed.index(WHO * 2 + half), p_ring.index(WHO * 2 + half))
        # Scales are loaded two groups ahead, and where they are nested looked up and multiplied one group ahead.
        now = ahead
        ahead = _scales_of(found, absmax, absmax_code, offset, NESTED, G)
        found = _fetch_scales(i + 2 * PG * G, scales, row, base, row_blocks, N, begin, steps, BLOCK, ACROSS, WHOLE, G)
        for u in gl.static_range(G):
            if i + u < steps:
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(full.index(stage), BM * 128)
                _load_tile(x_desc, [batch, (begin + i + u) * 64], full.index(stage), x_ring.index(stage))
                scale = now[u]
                if ACROSS:
                    # The sum has no terms past N: what was read there again counts nothing.
                    scale = gl.where(row + (i + u) * 64 < N, scale, 0.0)
                pairs = _decode_block(words[u], scale, levels, DT)
                if ACROSS:
                    # The tile [64 terms, 128 columns] lies in shared memory in strips of 64 columns.
                    pairs = pairs.reshape([4, 2, 16, 32]).permute((1, 0, 2, 3)).reshape([128, 32])
                w_ring.index(stage).store(pairs)
                _barrier()
                mbarrier.arrive(full.index(stage), count=1)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase = phase ^ 1
        if PG > 1:
            stage += (PG - 1) * G
            if stage >= STAGES:
                stage -= STAGES
                phase = phase ^ 1
        half = half ^ 1
        if half == 0:
            half_phase = half_phase ^ 1
    # Two copies past the end are still under way; the memory is not free before they have landed.
    for _ in gl.static_range(2):
        mbarrier.wait(packed.index(WHO * 2 + half), half_phase)
        half = half ^ 1
        if half == 0:
            half_phase = half_phase ^ 1


@gluon.jit
def _consume(
    w_ring, x_ring, full, empty, result,
    BN: gl.constexpr, BM: gl.constexpr, ACROSS: gl.constexpr, SPLIT: gl.constexpr, BIAS: gl.constexpr,
    STAGES: gl.constexpr, NW: gl.constexpr,
):  # fmt: skip
    """Multiply what the rings bring; write the tile."""
    bias_ptr, out_ptr, M, width, first, batch, split, steps = result
    DT: gl.constexpr = x_ring.dtype
    acc_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, BM, 16])
    w_shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    acc = gl.zeros((BN, BM), gl.float32, acc_l)
    stage = 0
    phase = 0
    for i in range(steps):
        mbarrier.wait(full.index(stage), phase)
        # What ordinary stores wrote, the tensor cores read after a fence. Here, because a fence waits for all that its
        # thread has under way, and the producers have loads under way for the steps to come.
        fence_async_shared()
        if ACROSS:
            A = _view(w_ring.index(stage), DT, 64, BN, w_shared).permute((1, 0))
        else:
            A = _view(w_ring.index(stage), DT, BN, 64, w_shared)
        B = x_ring.index(stage).permute((1, 0))
        acc = warpgroup_mma(A, B, acc, is_async=True)
        # The step before is through: its stage may be filled again.
        acc = warpgroup_mma_wait(1, deps=(acc,))
        before = gl.where(stage == 0, STAGES - 1, stage - 1)
        mbarrier.arrive(empty.index(before), count=1, pred=i > 0)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase = phase ^ 1
    acc = warpgroup_mma_wait(0, deps=(acc,))

    n = first + gl.arange(0, BN, gl.SliceLayout(1, acc_l))
    m = batch + gl.arange(0, BM, gl.SliceLayout(0, acc_l))
    if SPLIT:
        keep = (n < width)[:, None] & (m < M)[None, :]
        gl.store(out_ptr + (split * M + m[None, :]).to(gl.int64) * width + n[:, None], acc, mask=keep)
    else:
        if BIAS:
            acc += gl.load(bias_ptr + n, mask=n < width, other=0.0).to(gl.float32)[:, None]
        # Through the ring, which is free by now, so that lanes write 16 bytes and warps whole lines.
        _barrier()
        TILES: gl.constexpr = STAGES * 64 // BN
        tile = _tiles(x_ring, DT, TILES, BM, BN, w_shared).index(0)
        tile.permute((1, 0)).store(acc.to(DT))
        _barrier()
        o_l: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [NW, 1], [1, 0])
        om = batch + gl.arange(0, BM, gl.SliceLayout(1, o_l))
        on = first + gl.arange(0, BN, gl.SliceLayout(0, o_l))
        keep = (om < M)[:, None] & (on < width)[None, :]
        gl.store(out_ptr + om[:, None].to(gl.int64) * width + on[None, :], tile.load(o_l), mask=keep)


@gluon.jit(do_not_specialize=["M", "per_slice"])
def _gemm_4bit_decoded_kernel(
    w_desc, x_desc, absmax, absmax_8bit, absmax_code, absmax_offset, bias_ptr, out_ptr,
    l0, l1, l2, l3, l4, l5, l6, l7, l8, l9, l10, l11, l12, l13, l14, l15,
    M, N, K, row_blocks, steps, per_slice,
    BM: gl.constexpr, BLOCK: gl.constexpr, ACROSS: gl.constexpr, SPLIT: gl.constexpr, NESTED: gl.constexpr,
    BIAS: gl.constexpr, WHOLE: gl.constexpr, EIGHTS: gl.constexpr, NW: gl.constexpr, REGISTERS: gl.constexpr,
    STAGES: gl.constexpr, G: gl.constexpr, PG: gl.constexpr,
):  # fmt: skip
    """``out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]``, ACROSS: ``out[m, k] = sum_n x[m, n] * weight[n, k]``.

    Grid: (tiles of 128, splits, tiles of BM). A step is 64 terms of the sum, ``steps`` of them in all and ``per_slice``
    groups of G (2 or 4) in each slice. BLOCK weights, a multiple of 64, share a scale, and blocks do not straddle rows.
    ``w_desc`` describes the packed words of a group: [128 rows, 8 G words], ACROSS [64 G rows, 16 words]. WHOLE: not
    ACROSS, blocks of 64, and ``steps`` a multiple of G, so that a group's scales lie side by side. EIGHTS: rows of the
    result are a multiple of eight. NW warps multiply, PG (1 or 2) producers of four warps decode, with REGISTERS each
    for the latter; STAGES is even. With SPLIT fp32 sums go to ``out_ptr`` [splits, M, ...].
    """
    BN: gl.constexpr = 128
    DT: gl.constexpr = x_desc.dtype
    first = gl.program_id(0) * BN
    split = gl.program_id(1)
    batch = gl.program_id(2) * BM
    begin = split * (per_slice * G)
    mine = gl.minimum(per_slice * G, steps - begin)
    pair_l: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    p_ring = gl.allocate_shared_memory(
        gl.int32, [2 * PG, 64 * G, 16] if ACROSS else [2 * PG, 128, 8 * G], w_desc.layout
    )
    w_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BN, 32], pair_l)
    x_ring = gl.allocate_shared_memory(DT, [STAGES, BM, 64], x_desc.layout)
    packed = gl.allocate_shared_memory(gl.int64, [2 * PG, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2 * PG):
        mbarrier.init(packed.index(half), count=1)
    for stage in gl.static_range(STAGES):
        # The weight's arrival and the announcement of the activation's bytes.
        mbarrier.init(full.index(stage), count=2)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    levels = (l0, l1, l2, l3, l4, l5, l6, l7, l8, l9, l10, l11, l12, l13, l14, l15)
    width = K if ACROSS else N
    if EIGHTS:
        # Said so that the compiler knows: lanes may write 16 bytes.
        width = width // 8 * 8
    result = (bias_ptr, out_ptr, M, width, first, batch, split, mine)
    source = (w_desc, x_desc, absmax, absmax_8bit, absmax_code, absmax_offset, levels)
    place = (N, K, row_blocks, first, batch, begin, mine)
    rings = (p_ring, w_ring, x_ring)
    barriers = (packed, full, empty)
    if PG == 2:
        gl.warp_specialize(
            [
                (_consume, (w_ring, x_ring, full, empty, result, BN, BM, ACROSS, SPLIT, BIAS, STAGES, NW)),
                (_produce, (source, rings, barriers, place, BM, BLOCK, ACROSS, NESTED, WHOLE, STAGES, G, PG, 0)),
                (_produce, (source, rings, barriers, place, BM, BLOCK, ACROSS, NESTED, WHOLE, STAGES, G, PG, 1)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (w_ring, x_ring, full, empty, result, BN, BM, ACROSS, SPLIT, BIAS, STAGES, NW)),
                (_produce, (source, rings, barriers, place, BM, BLOCK, ACROSS, NESTED, WHOLE, STAGES, G, PG, 0)),
            ],
            [4],
            [REGISTERS],
        )
