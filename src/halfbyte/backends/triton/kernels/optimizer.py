"""Optimizer steps over many tensors in one launch: a table of addresses says which tensor a program works on.

Where the code map is one of the dynamic ones, a code is found by arithmetic. The ranks of such a map's cells are a
piecewise linear, concave function of the magnitude: one line a decade, the least of which is it. Half precision is
enough to come within one of the code, and a comparison with one midpoint decides.
"""

import struct

import triton
import triton.language as tl

from halfbyte.rules import FIELDS

__all__ = ["ANY", "COLUMNS", "SIGNED", "UNSIGNED", "_optimizer_kernel"]

COLUMNS = tl.constexpr(10)
"""Words a tensor in ``table``: parameter, gradient, three states, three absmax, elements, first program."""

ANY, SIGNED, UNSIGNED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Kinds of code maps: rising, the signed dynamic one, the unsigned one."""

_TINY = tl.constexpr(2.0**-100)
_BOOST = tl.constexpr(2.0**100)
_LARGEST = tl.constexpr(2.0**126)
_INFINITY = tl.constexpr(float("inf"))

_DECADES = 7
_REACH = 2.0**15
"""Magnitudes are at most 1; half precision holds them times this, and 1e-7 of it well."""


def _lines(signed):
    """Slope and height, by decade, of the rank of a magnitude's cell, from 1 (2 for the unsigned map) at 1e-7."""
    cells = 1 if signed else 2
    return [(cells * 0.2**decade * 1e6 / 0.9, cells * 2**decade * 8 / 9) for decade in range(_DECADES)]


def _half(value):
    return f"0x{struct.unpack('<H', struct.pack('<e', value))[0] * 0x10001:08X}"


def _assembly(signed):
    """PTX that guesses the codes of two values at once, each right or one too high."""
    height = 0.5 if signed else 1.0
    text = [
        "{ .reg .b32 x, a, n, t, s, c, d;",
        f"cvt.rn.f16x2.f32 x, $3, $2; mov.b32 c, {_half(_REACH)}; mul.rn.f16x2 x, x, c;",
        "and.b32 a, x, 0x7FFF7FFF; and.b32 s, x, 0x80008000;" if signed else "mov.b32 a, x;",
    ]
    for decade, (slope, start) in enumerate(_lines(signed)):
        to = "t" if decade else "n"
        text.append(f"mov.b32 c, {_half(slope / _REACH)}; mov.b32 d, {_half(start - height)};")
        text.append(f"fma.rn.f16x2 {to}, a, c, d;")
        if decade:
            text.append("min.f16x2 n, n, t;")
    if signed:
        text.append(f"xor.b32 n, n, s; mov.b32 c, {_half(127.5)}; add.rn.f16x2 n, n, c;")
    # From 1024 on, halves are integers, and the low byte of their bits counts them.
    text.append(f"mov.b32 c, {_half(1024.0)}; add.rn.f16x2 n, n, c;")
    text.append("and.b32 $0, n, 0xFF; bfe.u32 $1, n, 16, 8; }")
    return "\n".join(text)


_SIGNED_PTX = tl.constexpr(_assembly(True))
_UNSIGNED_PTX = tl.constexpr(_assembly(False))
_SLOPES = tl.constexpr([slope for slope, _ in _lines(True)])
_HEIGHTS = tl.constexpr([height for _, height in _lines(True)])


@triton.jit
def _random(element, seed):
    """16 random bits, as in the reference."""
    x = element.to(tl.uint32) + seed.to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return ((x ^ (x >> 16)) & 0xFFFF).to(tl.int32)


@triton.jit
def _entries(table, index, ROWS: tl.constexpr, BLOCKSIZE: tl.constexpr):
    """Entries of a table of 256 fp32, through shared memory."""
    whole = tl.load(table + tl.arange(0, 256))
    return tl.gather(whole, index.reshape(ROWS * BLOCKSIZE), 0).reshape(ROWS, BLOCKSIZE)


@triton.jit
def _guess(x, KIND: tl.constexpr, PTX: tl.constexpr):
    """The code of a value of [-1, 1] in a dynamic map, or one more."""
    if PTX and KIND == SIGNED:
        return tl.inline_asm_elementwise(_SIGNED_PTX, "=r,=r,r,r", [x], dtype=tl.int32, is_pure=True, pack=2)
    elif PTX:
        return tl.inline_asm_elementwise(_UNSIGNED_PTX, "=r,=r,r,r", [x], dtype=tl.int32, is_pure=True, pack=2)
    else:
        magnitude = tl.abs(x)
        n = magnitude * _SLOPES[0] + _HEIGHTS[0]
        for decade in tl.static_range(1, 7):
            n = tl.minimum(n, magnitude * _SLOPES[decade] + _HEIGHTS[decade])
        if KIND == SIGNED:
            n = tl.where(x < 0.0, 0.5 - n, n - 0.5) + 128.0
        else:
            n = 2.0 * n - 0.5
        return n.to(tl.int32)


@triton.jit
def _encode(
    value, codes, absmax, cuts, place, inside, block, has_block,
    KIND: tl.constexpr, MASKED: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, BLOCKSIZE: tl.constexpr,
):  # fmt: skip
    """Nearest codes and the block's scale. ``cuts``: entry ``i`` is the midpoint below code ``i``."""
    if MASKED:
        value = tl.where(inside, value, 0.0)
    largest = tl.max(tl.abs(value), axis=1)
    boost = tl.where(largest < _TINY, _BOOST, 1.0)
    reciprocal = tl.where(largest == 0.0, 0.0, tl.div_rn(1.0, largest * boost))
    # One product, the same to the bit unless the absmax is subnormal: then the factor would overflow.
    scaled = value * tl.minimum(boost * reciprocal, _LARGEST)[:, None]
    if KIND == ANY:
        code = tl.zeros_like(scaled).to(tl.int32)
        for step in tl.static_range(8):
            higher = code + (128 >> step)
            code = tl.where(scaled > _entries(cuts, higher, ROWS, BLOCKSIZE), higher, code)
    else:
        code = _guess(scaled, KIND, PTX)
        code -= (scaled <= _entries(cuts, code, ROWS, BLOCKSIZE)).to(tl.int32)
    if MASKED:
        tl.store(codes + place, code.to(tl.uint8), mask=inside)
        tl.store(absmax + block, largest, mask=has_block)
    else:
        tl.store(codes + place, code.to(tl.uint8))
        tl.store(absmax + block, largest)


@triton.jit
def _at(word, TYPE: tl.constexpr, MASKED: tl.constexpr):
    """The address in a word of the table; divisible by 16 where whole blocks are stepped."""
    if MASKED:
        return tl.load(word).to(tl.pointer_type(TYPE))
    else:
        return tl.multiple_of(tl.load(word).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _read(pointer, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer, mask=inside, other=0)
    else:
        return tl.load(pointer)


@triton.jit
def _write(pointer, value, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer, value, mask=inside)
    else:
        tl.store(pointer, value)


@triton.jit
def _decode(
    codes, absmax, code, place, inside, block, has_block,
    MASKED: tl.constexpr, ROWS: tl.constexpr, BLOCKSIZE: tl.constexpr,
):  # fmt: skip
    index = _read(codes + place, inside, MASKED).to(tl.int32)
    scale = _read(absmax + block, has_block, MASKED)
    value = _entries(code, index, ROWS, BLOCKSIZE) * scale[:, None]
    if MASKED:
        value = tl.where(inside, value, 0.0)
    return value


@triton.jit(do_not_specialize=["seed", *FIELDS])
def _optimizer_kernel(
    table, owners, hyper, seed, code0, code1, code2, cuts0, cuts1, cuts2,
    lr, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, weight_decay, step, unbias1, unbias2, grad_scale,
    update_scale,
    RULE: tl.constexpr, STATES: tl.constexpr, COUPLED: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
    KIND0: tl.constexpr, KIND1: tl.constexpr, KIND2: tl.constexpr, EIGHT: tl.constexpr, MASKED: tl.constexpr,
    SKIP_ZEROS: tl.constexpr, RANDOM: tl.constexpr, LOADED: tl.constexpr, PTX: tl.constexpr,
    BLOCKSIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS blocks of BLOCKSIZE values of one tensor: which one, ``owners`` says by program.

    P and G: dtypes of parameter and gradient. MASKED: addresses may be odd, and the last block short. LOADED: the
    rule's numbers are in ``hyper``, not in the arguments. PTX: for NVIDIA.
    """
    if LOADED:  # first, so that the wait for them is not on top of those that follow
        lr = tl.load(hyper)
        beta1 = tl.load(hyper + 1)
        rest1 = tl.load(hyper + 2)
        beta2 = tl.load(hyper + 3)
        rest2 = tl.load(hyper + 4)
        beta3 = tl.load(hyper + 5)
        rest3 = tl.load(hyper + 6)
        alpha = tl.load(hyper + 7)
        eps = tl.load(hyper + 8)
        weight_decay = tl.load(hyper + 9)
        step = tl.load(hyper + 10)
        unbias1 = tl.load(hyper + 11)
        unbias2 = tl.load(hyper + 12)
        grad_scale = tl.load(hyper + 13)
        update_scale = tl.load(hyper + 14)
    program = tl.program_id(0).to(tl.int64)
    words = table + tl.load(owners + program) * COLUMNS
    row = (program - tl.load(words + 9)) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    numel = tl.load(words + 8)
    inside = place < numel
    has_block = row * BLOCKSIZE < numel
    param = _at(words, P, MASKED)
    grad = _at(words + 1, G, MASKED)
    p = _read(param + place, inside, MASKED).to(tl.float32)
    g = _read(grad + place, inside, MASKED).to(tl.float32)

    S: tl.constexpr = tl.uint8 if EIGHT else tl.float32
    s0 = _at(words + 2, S, MASKED)
    s1 = _at(words + 3, S, MASKED)
    s2 = _at(words + 4, S, MASKED)
    a0 = tl.load(words + 5).to(tl.pointer_type(tl.float32))
    a1 = tl.load(words + 6).to(tl.pointer_type(tl.float32))
    a2 = tl.load(words + 7).to(tl.pointer_type(tl.float32))
    if EIGHT:
        m0 = _decode(s0, a0, code0, place, inside, row, has_block, MASKED, ROWS, BLOCKSIZE)
        m1 = m0
        m2 = m0
        if STATES > 1:
            m1 = _decode(s1, a1, code1, place, inside, row, has_block, MASKED, ROWS, BLOCKSIZE)
        if STATES > 2:
            m2 = _decode(s2, a2, code2, place, inside, row, has_block, MASKED, ROWS, BLOCKSIZE)
    else:
        m0 = _read(s0 + place, inside, MASKED)
        m1 = m0
        m2 = m0
        if STATES > 1:
            m1 = _read(s1 + place, inside, MASKED)
        if STATES > 2:
            m2 = _read(s2 + place, inside, MASKED)

    active = g != 0.0
    g = g * grad_scale
    if COUPLED:
        g = tl.where(weight_decay > 0.0, g + weight_decay * p, g)
    n1 = m1
    n2 = m2
    if STATES == 1:
        update, n0 = RULE(
            g, m0, lr, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, weight_decay, step, unbias1, unbias2,
            grad_scale, update_scale,
        )  # fmt: skip
    elif STATES == 2:
        update, n0, n1 = RULE(
            g, m0, m1, lr, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, weight_decay, step, unbias1, unbias2,
            grad_scale, update_scale,
        )  # fmt: skip
    else:
        update, n0, n1, n2 = RULE(
            g, m0, m1, m2, lr, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, weight_decay, step, unbias1,
            unbias2, grad_scale, update_scale,
        )  # fmt: skip
    update = update * update_scale
    decayed = p
    if not COUPLED:
        decayed = tl.where(weight_decay > 0.0, p - (lr * weight_decay) * p, p)
    stepped = decayed - lr * update
    ok = (tl.abs(update) < _INFINITY) & (tl.abs(n0) < _INFINITY)
    if STATES > 1:
        ok = ok & (tl.abs(n1) < _INFINITY)
    if STATES > 2:
        ok = ok & (tl.abs(n2) < _INFINITY)
    if SKIP_ZEROS:
        ok = ok & active
    stepped = tl.where(ok, stepped, p)
    n0 = tl.where(ok, n0, m0)
    n1 = tl.where(ok, n1, m1)
    n2 = tl.where(ok, n2, m2)

    if RANDOM:
        bits = stepped.to(tl.int32, bitcast=True)
        up = (bits + _random(place, seed)) & -65536
        stepped = tl.where(tl.abs(stepped) < _INFINITY, up.to(tl.float32, bitcast=True), stepped)
    _write(param + place, stepped.to(P), inside, MASKED)
    if EIGHT:
        _encode(n0, s0, a0, cuts0, place, inside, row, has_block, KIND0, MASKED, PTX, ROWS, BLOCKSIZE)
        if STATES > 1:
            _encode(n1, s1, a1, cuts1, place, inside, row, has_block, KIND1, MASKED, PTX, ROWS, BLOCKSIZE)
        if STATES > 2:
            _encode(n2, s2, a2, cuts2, place, inside, row, has_block, KIND2, MASKED, PTX, ROWS, BLOCKSIZE)
    else:
        _write(s0 + place, n0, inside, MASKED)
        if STATES > 1:
            _write(s1 + place, n1, inside, MASKED)
        if STATES > 2:
            _write(s2 + place, n2, inside, MASKED)
