"""Decoding whole blocks of 64 weights, one a thread, in Gluon: the scaled levels are a table in registers.

The 16 levels times the block's absmax, each rounded once to 16 bits, are eight registers: a plane of high bytes and one
of low bytes. A byte permutation looks up four codes in half of a plane, and another one chooses between the halves.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["_decode_block"]


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
