"""Decoding packed words into MMA registers, in Gluon: by a table of byte pairs in shared memory, or by byte
permutation.

A byte holds two codes, so 256 entries of two 16-bit levels decode it whole, one load for one 32-bit register. The table
stands in shared memory 32 times, once per bank: entry ``b`` of copy ``lane`` lies at ``128*b + 4*lane``, so that the
lanes
of a warp never meet in a bank whatever their codes are. That costs one integer instruction and half a load a weight.

Permutation costs 2.6 integer instructions a weight, and no memory: the 16 levels are eight 32-bit words, one plane of
high
bytes and one of low bytes. It serves where shared memory is needed for the activation and the integer pipe has room.

The table is declared in PTX, because Triton (3.6) has no lookup in its own shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["_decode_words", "_fill_pair_table"]

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

_FILL: gl.constexpr = gl.constexpr(
    """{
    .reg .b32 a;
    mov.u32 a, halfbyte_pairs;
    add.u32 a, a, $1;
    st.shared.v4.b32 [a], {$2, $2, $2, $2};
    mov.u32 $0, 0;
    }"""
)
_DECLARE: gl.constexpr = gl.constexpr(".shared .align 128 .b8 halfbyte_pairs[32768];\nmov.u32 $0, $1;")
_TOKEN: gl.constexpr = gl.constexpr("mov.u32 $0, $1;")


def _table_assembly():
    """PTX for eight codes: $0..$7 the 16-bit levels, $8 the packed word, $9 four times the lane."""
    lines = ["{ .reg .b32 a0, a1, a2, a3, q0, q1, q2, q3, t;", "mov.u32 t, halfbyte_pairs;"]
    lines += ["shl.b32 a0, $8, 7;", "shr.u32 a1, $8, 1;", "shr.u32 a2, $8, 9;", "shr.u32 a3, $8, 17;"]
    for i in range(4):
        lines += [
            f"lop3.b32 a{i}, a{i}, 0x7f80, $9, 0xEA;",
            f"add.u32 a{i}, a{i}, t;",
            f"ld.shared.b32 q{i}, [a{i}];",
            f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, q{i};",
        ]
    return "\n".join([*lines, "}"])


def _permutation_assembly():
    """PTX for eight codes: $0..$7 the levels, $8 the word, $9..$12 high and $13..$16 low bytes of the 16 levels."""
    lines = [
        "{ .reg .b32 s0, s1, m0, m1, a, b, h0, h1, l0, l1, q0, q1, q2, q3;",
        "and.b32 s0, $8, 0x77777777;",
        "shr.u32 s1, s0, 16;",
        "shr.u32 m0, $8, 1;",
        "lop3.b32 m0, m0, 0x44444444, 0x32103210, 0xEA;",
        "shr.u32 m1, m0, 16;",
    ]
    for half in (0, 1):
        for plane, first in (("h", 9), ("l", 13)):
            lines += [
                f"prmt.b32 a, ${first}, ${first + 1}, s{half};",
                f"prmt.b32 b, ${first + 2}, ${first + 3}, s{half};",
                f"prmt.b32 {plane}{half}, a, b, m{half};",
            ]
    # The high nibble of a byte is the even element, so bytes 1 and 0 of a plane are elements 0 and 1.
    lines += [f"prmt.b32 q{2 * half}, l{half}, h{half}, 0x4051;" for half in (0, 1)]
    lines += [f"prmt.b32 q{2 * half + 1}, l{half}, h{half}, 0x6273;" for half in (0, 1)]
    lines += [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, q{i};" for i in range(4)]
    return "\n".join([*lines, "}"])


_BY_TABLE: gl.constexpr = gl.constexpr(_table_assembly())
_BY_TABLE_CONSTRAINTS: gl.constexpr = gl.constexpr(",".join(["=h"] * 8 + ["r"] * 2))
_BY_PERMUTATION: gl.constexpr = gl.constexpr(_permutation_assembly())
_BY_PERMUTATION_CONSTRAINTS: gl.constexpr = gl.constexpr(",".join(["=h"] * 8 + ["r"] * 9))


@gluon.jit
def _fill_pair_table(pairs, WARPS: gl.constexpr):
    """Copy the 256 pairs into shared memory, 32 times each; returns a zero that exists only once all is written."""
    THREADS: gl.constexpr = 32 * WARPS
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    thread = gl.arange(0, THREADS, layout)
    zero = gl.inline_asm_elementwise(_DECLARE, "=r,r", [thread * 0], dtype=gl.int32, is_pure=False, pack=1)
    for i in gl.static_range(256 * 8 // THREADS):
        entry = i * (THREADS // 8) + thread // 8
        pair = gl.load(pairs + entry)
        place = entry * 128 + (thread % 8) * 16 + zero
        gl.inline_asm_elementwise(_FILL, "=r,r,r", [place, pair], dtype=gl.int32, is_pure=False, pack=1)
    _barrier()
    after = gl.inline_asm_elementwise(_TOKEN, "=r,r", [zero], dtype=gl.int32, is_pure=False, pack=1)
    return gl.max(after, axis=0)


@gluon.jit
def _decode_words(words, decoding, DT: gl.constexpr, TABLE: gl.constexpr):
    """The eight levels of every packed word: [*words.shape, 2, 2, 2], the axes counting codes by 1, by 4 and by 2.

    Args:
        decoding: With TABLE, four times the lane that holds the word plus what :func:`_fill_pair_table` returned; else
            eight scalars, the high bytes of the 16 levels and then the low bytes. They stay in the constant bank only
            as arguments of the kernel: loaded, they would cost a move for every permutation.
    """
    if TABLE:
        a0, a1, a2, a3, a4, a5, a6, a7 = gl.inline_asm_elementwise(
            _BY_TABLE,
            _BY_TABLE_CONSTRAINTS,
            [words, decoding[0]],
            dtype=(gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16),
            is_pure=True,
            pack=1,
        )
    else:
        h0, h1, h2, h3, l0, l1, l2, l3 = decoding
        a0, a1, a2, a3, a4, a5, a6, a7 = gl.inline_asm_elementwise(
            _BY_PERMUTATION,
            _BY_PERMUTATION_CONSTRAINTS,
            [words, h0, h1, h2, h3, l0, l1, l2, l3],
            dtype=(gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16),
            is_pure=True,
            pack=1,
        )
    even = gl.join(gl.join(a0, a1), gl.join(a4, a5))
    odd = gl.join(gl.join(a2, a3), gl.join(a6, a7))
    return gl.join(even, odd).to(DT, bitcast=True)
