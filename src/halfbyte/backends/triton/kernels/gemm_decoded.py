"""The 4-bit product for large batches on Hopper, in Gluon: some warps decode the weight into shared memory, others
multiply.

Producer warps hold one block of 64 weights a thread. They scale the 16 levels by the block's absmax first, so that the
16 products, rounded once, are a table in registers, and every code is then looked up by byte permutation: what lands in
shared memory is the dequantized weight to the last bit. The activation comes beside it by the copy engine. Consumer
warps do nothing but wgmma. Two rings of barriers connect them.

Read along its rows the weight gives ``x @ weight.T``, read across them (ACROSS) ``grad @ weight``: the tensor cores
take
the transposed tile as it is.
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

__all__ = ["_gemm_4bit_decoded_kernel"]

# Triton 3.9 renamed the copy; the arguments used here kept their places.
_load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


def _table_assembly(kind):
    """PTX for a block's table: $0..$3 high and $4..$7 low bytes of 16 scaled levels, $8 the scale, $9..$24 the
    levels."""
    lines = ["{ .reg .f32 p0, p1; .reg .b32 q0, q1, q2, q3, q4, q5, q6, q7;"]
    for i in range(8):
        lines += [
            f"mul.rn.f32 p0, $8, ${9 + 2 * i};",
            f"mul.rn.f32 p1, $8, ${10 + 2 * i};",
            f"cvt.rn.{kind}.f32 q{i}, p1, p0;",
        ]
    for i in range(4):
        lines += [f"prmt.b32 ${i}, q{2 * i}, q{2 * i + 1}, 0x7531;"]
        lines += [f"prmt.b32 ${4 + i}, q{2 * i}, q{2 * i + 1}, 0x6420;"]
    return "\n".join([*lines, "}"])


def _lookup_assembly():
    """PTX for eight codes: $0..$3 pairs of values, $4 the packed word, $5..$12 the table."""
    lines = [
        "{ .reg .b32 s0, s1, m0, m1, a, b, h0, h1, l0, l1;",
        "and.b32 s0, $4, 0x77777777;",
        "shr.u32 s1, s0, 16;",
        "shr.u32 m0, $4, 1;",
        "lop3.b32 m0, m0, 0x44444444, 0x32103210, 0xEA;",
        "shr.u32 m1, m0, 16;",
    ]
    for half in (0, 1):
        for plane, first in (("h", 5), ("l", 9)):
            lines += [
                f"prmt.b32 a, ${first}, ${first + 1}, s{half};",
                f"prmt.b32 b, ${first + 2}, ${first + 3}, s{half};",
                f"prmt.b32 {plane}{half}, a, b, m{half};",
            ]
    # The high nibble of a byte is the even element, so bytes 1 and 0 of a plane are elements 0 and 1.
    lines += [f"prmt.b32 ${2 * half}, l{half}, h{half}, 0x4051;" for half in (0, 1)]
    lines += [f"prmt.b32 ${2 * half + 1}, l{half}, h{half}, 0x6273;" for half in (0, 1)]
    return "\n".join([*lines, "}"])


_TABLE_BF16: gl.constexpr = gl.constexpr(_table_assembly("bf16x2"))
_TABLE_FP16: gl.constexpr = gl.constexpr(_table_assembly("f16x2"))
# Outputs are written before the last input is read.
_TABLE_CONSTRAINTS: gl.constexpr = gl.constexpr(",".join(["=&r"] * 8 + ["f"] * 17))
_LOOKUP: gl.constexpr = gl.constexpr(_lookup_assembly())
_LOOKUP_CONSTRAINTS: gl.constexpr = gl.constexpr(",".join(["=&r"] * 4 + ["r"] * 9))


@gluon.constexpr_function
def _word_layout(BLOCKS, WARPS):
    """Words [BLOCKS, 8] of blocks: a whole block, or half of one, a thread."""
    words = min(8, BLOCKS * 8 // (32 * WARPS))
    return gl.BlockedLayout([1, words], [32 // (8 // words), 8 // words], [WARPS, 1], [1, 0])


@gluon.jit
def _decode_block(words, scale, levels, DT: gl.constexpr):
    """Pairs [BLOCKS, 32] of 16-bit values of packed words [BLOCKS, 8] with scales [BLOCKS]."""
    l0, l1, l2, l3, l4, l5, l6, l7, l8, l9, l10, l11, l12, l13, l14, l15 = levels
    table = gl.inline_asm_elementwise(
        _TABLE_BF16 if gl.bfloat16 == DT else _TABLE_FP16,
        _TABLE_CONSTRAINTS,
        [scale, l0, l1, l2, l3, l4, l5, l6, l7, l8, l9, l10, l11, l12, l13, l14, l15],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    t0, t1, t2, t3, t4, t5, t6, t7 = table
    p0, p1, p2, p3 = gl.inline_asm_elementwise(
        _LOOKUP,
        _LOOKUP_CONSTRAINTS,
        [
            words, t0[:, None], t1[:, None], t2[:, None], t3[:, None], t4[:, None], t5[:, None], t6[:, None],
            t7[:, None],
        ],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )  # fmt: skip
    pairs = gl.join(gl.join(p0, p2), gl.join(p1, p3))
    return pairs.reshape([words.shape[0], 32])


if hasattr(gl.shared_memory_descriptor, "_reinterpret"):

    @gluon.jit
    def _view(memory, DT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
        """The same shared memory as a tile [ROWS, COLUMNS]."""
        return memory._reinterpret(DT, [ROWS, COLUMNS], layout)

else:  # renamed in Triton 3.7

    @gluon.jit
    def _view(memory, DT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
        """The same shared memory as a tile [ROWS, COLUMNS]."""
        return memory.reinterpret(DT, [ROWS, COLUMNS], layout)


@gluon.jit
def _fetch(
    i, words_ptr, scales, row, word, w_base, i_base, row_words, row_blocks, N, begin, steps,
    BLOCK: gl.constexpr, ACROSS: gl.constexpr,
):  # fmt: skip
    """Words [BLOCKS, 8], absmax or its code, and the block's number [BLOCKS] of step ``i``, or of the last one."""
    if ACROSS:
        at = gl.minimum(row + i * 64, N - 1)
        index = at * row_blocks + i_base
        first = at * row_words + w_base
    else:
        i = gl.minimum(i, steps - 1)
        index = i_base + (begin + i) * 64 // BLOCK
        first = w_base + i * 8
    return gl.load(words_ptr + (first[:, None] + word[None, :])), gl.load(scales + index), index


@gluon.jit
def _produce(
    source, w_ring, x_ring, written, full, empty, place,
    BN: gl.constexpr, BM: gl.constexpr, BLOCK: gl.constexpr, ACROSS: gl.constexpr, NESTED: gl.constexpr,
    STAGES: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Fill the rings: for every step of 64 terms the activation and the decoded weight."""
    w_ptr, x_desc, absmax, absmax_8bit, absmax_code, absmax_offset, levels = source
    N, K, row_words, row_blocks, first, batch, begin, steps = place
    DT: gl.constexpr = x_ring.dtype
    w_l: gl.constexpr = _word_layout(BN, WARPS)
    block = gl.arange(0, BN, gl.SliceLayout(1, w_l))
    word = gl.arange(0, 8, gl.SliceLayout(0, w_l))
    if ACROSS:
        # Blocks stand column by column: the tile [64 terms, BN columns] lies in shared memory in strips of 64 columns.
        row = begin * 64 + block % 64
        column = gl.minimum(first + (block // 64) * 64, K - 64)
        w_base = column // 8
        i_base = column // BLOCK
    else:
        row = gl.minimum(first + block, N - 1)
        w_base = row * row_words + begin * 8
        i_base = row * row_blocks
    words_ptr = w_ptr.cast(gl.pointer_type(gl.int32), bitcast=True)
    scales = absmax_8bit if NESTED else absmax
    if NESTED:
        offset = gl.load(absmax_offset)
    queue = ()
    for i in gl.static_range(AHEAD):
        queue = queue + (
            _fetch(
                i, words_ptr, scales, row, word, w_base, i_base, row_words, row_blocks, N, begin, steps, BLOCK, ACROSS
            ),
        )
    stage = 0
    phase = 1
    for i in range(steps):
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), BM * 128)
        _load_tile(x_desc, [batch, (begin + i) * 64], full.index(stage), x_ring.index(stage))
        words, scale, index = queue[0]
        rest = ()
        for a in gl.static_range(1, AHEAD):
            rest = rest + (queue[a],)
        queue = rest + (
            _fetch(
                i + AHEAD, words_ptr, scales, row, word, w_base, i_base, row_words, row_blocks, N, begin, steps, BLOCK,
                ACROSS,
            ),
        )  # fmt: skip
        if NESTED:
            scale = gl.load(absmax_code + scale.to(gl.int32)) * gl.load(absmax + index // 256) + offset
        if ACROSS:
            # The sum has no terms past N: what was read there again counts nothing.
            scale = gl.where(row + i * 64 < N, scale, 0.0)
        w_ring.index(stage).store(_decode_block(words, scale, levels, DT))
        _barrier()
        mbarrier.arrive(written.index(stage), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase = phase ^ 1


@gluon.jit
def _relay(written, full, steps, STAGES: gl.constexpr):
    """Hand decoded stages on to the tensor cores, with the fence that their reading needs."""
    stage = 0
    phase = 0
    for _ in range(steps):
        mbarrier.wait(written.index(stage), phase)
        fence_async_shared()
        mbarrier.arrive(full.index(stage), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase = phase ^ 1


@gluon.jit
def _consume(
    w_ring, x_ring, full, empty, result,
    BN: gl.constexpr, BM: gl.constexpr, ACROSS: gl.constexpr, SPLIT: gl.constexpr, BIAS: gl.constexpr,
    STAGES: gl.constexpr, NW: gl.constexpr, RELAY: gl.constexpr,
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
        if not RELAY:
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
    if SPLIT > 1:
        keep = (n < width)[:, None] & (m < M)[None, :]
        gl.store(out_ptr + (split * M + m[None, :]).to(gl.int64) * width + n[:, None], acc, mask=keep)
    else:
        if BIAS:
            acc += gl.load(bias_ptr + n, mask=n < width, other=0.0).to(gl.float32)[:, None]
        # Through the ring, which is free by now, so that lanes write 16 bytes and warps whole lines.
        _barrier()
        tile = _view(x_ring, DT, BM, BN, w_shared)
        tile.permute((1, 0)).store(acc.to(DT))
        _barrier()
        o_l: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [NW, 1], [1, 0])
        om = batch + gl.arange(0, BM, gl.SliceLayout(1, o_l))
        on = first + gl.arange(0, BN, gl.SliceLayout(0, o_l))
        keep = (om < M)[:, None] & (on < width)[None, :]
        gl.store(out_ptr + om[:, None].to(gl.int64) * width + on[None, :], tile.load(o_l), mask=keep)


@gluon.jit(do_not_specialize=["M"])
def _gemm_4bit_decoded_kernel(
    w_ptr, x_desc, absmax, absmax_8bit, absmax_code, absmax_offset, bias_ptr, out_ptr,
    l0, l1, l2, l3, l4, l5, l6, l7, l8, l9, l10, l11, l12, l13, l14, l15,
    M, N, K, row_words, row_blocks, steps, per_slice,
    BN: gl.constexpr, BM: gl.constexpr, BLOCK: gl.constexpr, ACROSS: gl.constexpr, SPLIT: gl.constexpr,
    NESTED: gl.constexpr, BIAS: gl.constexpr, NW: gl.constexpr, PW: gl.constexpr, REGISTERS: gl.constexpr,
    AHEAD: gl.constexpr, RELAY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """``out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]``, ACROSS: ``out[m, k] = sum_n x[m, n] * weight[n, k]``.

    Grid: (tiles of BN, SPLIT, tiles of BM). A step is 64 terms of the sum, ``steps`` of them in all and ``per_slice``
    in
    each of the SPLIT slices. BLOCK weights, a multiple of 64, share a scale, and blocks do not straddle rows. NW warps
    multiply, PW decode, with REGISTERS each for the latter. What ordinary stores wrote, the tensor cores read after a
    fence. It waits for all that its thread has under way, loads for the steps to come as well, so the producers leave
    it to the consumers or (RELAY) to a warp that does nothing else. With SPLIT > 1 fp32 sums go to ``out_ptr``
    [SPLIT, M, ...].
    """
    DT: gl.constexpr = x_desc.dtype
    first = gl.program_id(0) * BN
    split = gl.program_id(1)
    batch = gl.program_id(2) * BM
    begin = split * per_slice
    mine = gl.minimum(per_slice, steps - begin)
    pair_l: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    w_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BN, 32], pair_l)
    x_ring = gl.allocate_shared_memory(DT, [STAGES, BM, 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # A stage is written, then full: the same, unless a warp stands between.
    written = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()) if RELAY else full
    for stage in gl.static_range(STAGES):
        if RELAY:
            mbarrier.init(written.index(stage), count=1)
        # The weight's arrival and the announcement of the activation's bytes.
        mbarrier.init(full.index(stage), count=2)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    levels = (l0, l1, l2, l3, l4, l5, l6, l7, l8, l9, l10, l11, l12, l13, l14, l15)
    width = K if ACROSS else N
    result = (bias_ptr, out_ptr, M, width, first, batch, split, mine)
    source = (w_ptr, x_desc, absmax, absmax_8bit, absmax_code, absmax_offset, levels)
    place = (N, K, row_words, row_blocks, first, batch, begin, mine)
    if RELAY:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (w_ring, x_ring, full, empty, result, BN, BM, ACROSS, SPLIT, BIAS, STAGES, NW, RELAY),
                ),
                (
                    _produce,
                    (
                        source, w_ring, x_ring, written, full, empty, place, BN, BM, BLOCK, ACROSS, NESTED, STAGES,
                        AHEAD, PW,
                    ),
                ),
                (_relay, (written, full, mine, STAGES)),
            ],
            [PW, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (w_ring, x_ring, full, empty, result, BN, BM, ACROSS, SPLIT, BIAS, STAGES, NW, RELAY),
                ),
                (
                    _produce,
                    (
                        source, w_ring, x_ring, written, full, empty, place, BN, BM, BLOCK, ACROSS, NESTED, STAGES,
                        AHEAD, PW,
                    ),
                ),
            ],
            [PW],
            [REGISTERS],
        )  # fmt: skip
