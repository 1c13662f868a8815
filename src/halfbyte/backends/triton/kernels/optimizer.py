"""Optimizer steps over many tensors in one launch: a table of addresses says which tensor a program works on."""

import triton
import triton.language as tl

__all__ = ["COLUMNS", "_optimizer_kernel"]

COLUMNS = tl.constexpr(10)
"""Words a tensor in ``table``: parameter, gradient, three states, three absmax, elements, first program."""

_TINY = tl.constexpr(2.0**-100)
_BOOST = tl.constexpr(2.0**100)
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _finite(x):
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < _INFINITY


@triton.jit
def _tensor_of(table, tensors, program):
    """Number of the last tensor whose first program is not behind this one."""
    low = 0
    high = tensors
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * COLUMNS + 9) <= program
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _random(element, seed):
    """16 random bits, as in the reference."""
    x = element.to(tl.uint32) + seed.to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return ((x ^ (x >> 16)) & 0xFFFF).to(tl.int32)


@triton.jit
def _decode(codes, absmax, code, place, inside, block, has_block):
    value = tl.load(code + tl.load(codes + place, mask=inside, other=0).to(tl.int32))
    scale = tl.load(absmax + block, mask=has_block, other=0.0)
    return tl.where(inside, value * scale[:, None], 0.0)


@triton.jit
def _encode(value, codes, absmax, ranks, low, high, shift, place, inside, block, has_block):
    """Nearest codes by one table entry each (``formats/ranks.py``), and the block's scale."""
    bits = tl.where(inside, value, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    boost = tl.where(largest < _TINY, _BOOST, 1.0)
    reciprocal = tl.where(largest == 0, 0.0, tl.div_rn(1.0, largest * boost))
    scaled = ((value * boost[:, None]) * reciprocal[:, None]).to(tl.int32, bitcast=True)
    rising = tl.where(scaled < 0, scaled ^ 0x7FFFFFFF, scaled)
    key = tl.minimum(tl.maximum(rising >> shift, low), high) - low
    entry = tl.load(ranks + key)
    cut = (entry >> 8) & 0xFFFFFF
    above = (rising & ((1 << shift) - 1)) > cut
    tl.store(codes + place, ((entry & 0xFF) + above.to(tl.int32)).to(tl.uint8), mask=inside)
    tl.store(absmax + block, largest, mask=has_block)


@triton.jit
def _optimizer_kernel(
    table, tensors, hyper, seed,
    code0, code1, code2, ranks0, ranks1, ranks2, low0, low1, low2, high0, high1, high2, shift0, shift1, shift2,
    RULE: tl.constexpr, STATES: tl.constexpr, COUPLED: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
    EIGHT: tl.constexpr, SKIP_ZEROS: tl.constexpr, RANDOM: tl.constexpr, BLOCKSIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS blocks of BLOCKSIZE values of one tensor. P and G: dtypes of parameter and gradient."""
    program = tl.program_id(0).to(tl.int64)
    words = table + _tensor_of(table, tensors, program) * COLUMNS
    numel = tl.load(words + 8)
    row = (program - tl.load(words + 9)) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    inside = place < numel
    has_block = row * BLOCKSIZE < numel
    param = tl.load(words).to(tl.pointer_type(P))
    grad = tl.load(words + 1).to(tl.pointer_type(G))
    p = tl.load(param + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)

    if EIGHT:
        s0 = tl.load(words + 2).to(tl.pointer_type(tl.uint8))
        s1 = tl.load(words + 3).to(tl.pointer_type(tl.uint8))
        s2 = tl.load(words + 4).to(tl.pointer_type(tl.uint8))
        a0 = tl.load(words + 5).to(tl.pointer_type(tl.float32))
        a1 = tl.load(words + 6).to(tl.pointer_type(tl.float32))
        a2 = tl.load(words + 7).to(tl.pointer_type(tl.float32))
        m0 = _decode(s0, a0, code0, place, inside, row, has_block)
        m1 = m0
        m2 = m0
        if STATES > 1:
            m1 = _decode(s1, a1, code1, place, inside, row, has_block)
        if STATES > 2:
            m2 = _decode(s2, a2, code2, place, inside, row, has_block)
    else:
        s0 = tl.load(words + 2).to(tl.pointer_type(tl.float32))
        s1 = tl.load(words + 3).to(tl.pointer_type(tl.float32))
        s2 = tl.load(words + 4).to(tl.pointer_type(tl.float32))
        m0 = tl.load(s0 + place, mask=inside, other=0.0)
        m1 = m0
        m2 = m0
        if STATES > 1:
            m1 = tl.load(s1 + place, mask=inside, other=0.0)
        if STATES > 2:
            m2 = tl.load(s2 + place, mask=inside, other=0.0)

    lr = tl.load(hyper)
    beta1 = tl.load(hyper + 1)
    rest1 = tl.load(hyper + 2)
    beta2 = tl.load(hyper + 3)
    rest2 = tl.load(hyper + 4)
    beta3 = tl.load(hyper + 5)
    rest3 = tl.load(hyper + 6)
    alpha = tl.load(hyper + 7)
    eps = tl.load(hyper + 8)
    decay = tl.load(hyper + 9)
    step = tl.load(hyper + 10)
    unbias1 = tl.load(hyper + 11)
    unbias2 = tl.load(hyper + 12)
    grad_scale = tl.load(hyper + 13)
    update_scale = tl.load(hyper + 14)
    active = g != 0.0
    g = g * grad_scale
    if COUPLED:
        g = tl.where(decay > 0.0, g + decay * p, g)
    n1 = m1
    n2 = m2
    if STATES == 1:
        update, n0 = RULE(
            g, m0, lr, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, decay, step, unbias1, unbias2, grad_scale,
            update_scale,
        )  # fmt: skip
    elif STATES == 2:
        update, n0, n1 = RULE(
            g, m0, m1, lr, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, decay, step, unbias1, unbias2,
            grad_scale, update_scale,
        )  # fmt: skip
    else:
        update, n0, n1, n2 = RULE(
            g, m0, m1, m2, lr, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, decay, step, unbias1, unbias2,
            grad_scale, update_scale,
        )  # fmt: skip
    update = update * update_scale
    decayed = p
    if not COUPLED:
        decayed = tl.where(decay > 0.0, p - (lr * decay) * p, p)
    stepped = decayed - lr * update
    ok = _finite(update) & _finite(n0) & _finite(n1) & _finite(n2)
    if SKIP_ZEROS:
        ok = ok & active
    stepped = tl.where(ok, stepped, p)
    n0 = tl.where(ok, n0, m0)
    n1 = tl.where(ok, n1, m1)
    n2 = tl.where(ok, n2, m2)

    if RANDOM:
        bits = stepped.to(tl.int32, bitcast=True)
        up = (bits + _random(place, seed)) & -65536
        stepped = tl.where(_finite(stepped), up.to(tl.float32, bitcast=True), stepped)
    tl.store(param + place, stepped.to(P), mask=inside)
    if EIGHT:
        _encode(n0, s0, a0, ranks0, low0, high0, shift0, place, inside, row, has_block)
        if STATES > 1:
            _encode(n1, s1, a1, ranks1, low1, high1, shift1, place, inside, row, has_block)
        if STATES > 2:
            _encode(n2, s2, a2, ranks2, low2, high2, shift2, place, inside, row, has_block)
    else:
        tl.store(s0 + place, n0, mask=inside)
        if STATES > 1:
            tl.store(s1 + place, n1, mask=inside)
        if STATES > 2:
            tl.store(s2 + place, n2, mask=inside)
