"""Quantization in plain Triton: 4-bit by uniform cells, 8-bit by cells of the float's own bits; absmax in the same
pass.

A cell is a range of scaled values that at most one (4-bit) or few (8-bit) midpoints of the codebook cut. The number of
a
value's cell costs two or three instructions, its table entry says which codes lie below and above the cut, and one
comparison with the exact fp32 midpoint decides: the result is that of a search among all midpoints.
"""

import triton
import triton.language as tl

from halfbyte.backends.triton.kernels.optimizer import SIGNED, UNSIGNED, _entries, _guess

__all__ = ["_cells_8bit_kernel", "_quantize_4bit_kernel", "_quantize_blockwise_kernel"]

_TINY = tl.constexpr(2.0**-100)
_BOOST = tl.constexpr(2.0**100)


@triton.jit
def _scale_rows(values):
    """Rows over their absmax, and the absmax: by the fp32 reciprocal, tiny rows boosted first (as in the reference)."""
    # As integers, the bits of non-negative floats order like the floats, with NaN above inf: NaN wins the maximum.
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    absmax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    boost = tl.where(absmax < _TINY, _BOOST, 1.0)
    reciprocal = tl.where(absmax == 0, 0.0, tl.div_rn(1.0, absmax * boost))
    return (values * boost[:, None]) * reciprocal[:, None], absmax


@triton.jit
def _quantize_4bit_kernel(
    values, packed, absmax, cells, numel,
    BLOCKSIZE: tl.constexpr, ROWS: tl.constexpr, PER_UNIT: tl.constexpr, SIGN: tl.constexpr, ZERO_CODE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Codes and absmax of ROWS blocks. ``cells``: 128 words, the midpoint's bits below two 4-bit codes (below, above).

    Cell number: the nearest integer of PER_UNIT times the scaled value, plus 64 (SIGN: of its magnitude, plus 0).
    MASKED: the last program is not full.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS
    values += row * BLOCKSIZE
    packed += row * (BLOCKSIZE // 2)
    rows = tl.arange(0, ROWS)
    place = rows[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    if MASKED:
        left = tl.minimum(numel - row * BLOCKSIZE, ROWS * BLOCKSIZE).to(tl.int32)
        inside = place < left
        scaled, scales = _scale_rows(tl.load(values + place, mask=inside, other=0.0).to(tl.float32))
        tl.store(absmax + row + rows, scales, mask=rows * BLOCKSIZE < left)
    else:
        scaled, scales = _scale_rows(tl.load(values + place).to(tl.float32))
        tl.store(absmax + row + rows, scales)
    # The maximum with a number turns NaN into the lowest rank; adding 1.5*2**23 leaves the nearest integer in the low
    # bits.
    if SIGN:
        # Ties take the lower value: one ulp more for negative values makes "strictly below" an "at most".
        bits = scaled.to(tl.int32, bitcast=True)
        key = tl.maximum(((bits & 0x7FFFFFFF) + ((bits >> 31) & 1)).to(tl.float32, bitcast=True), 0.0)
        number = (key * PER_UNIT + 12582912.0).to(tl.int32, bitcast=True) & 127
    else:
        key = tl.maximum(scaled, -1.0)
        number = (key * PER_UNIT + (12582912.0 + 64.0)).to(tl.int32, bitcast=True) & 127
    cell = tl.load(cells + number)
    midpoint = cell.to(tl.int32).to(tl.float32, bitcast=True)
    code = ((cell >> 32).to(tl.int32) >> tl.where(key > midpoint, 4, 0)) & 15
    if SIGN:
        code |= tl.where(scaled < 0, 8, 0)
    if MASKED:
        code = tl.where(inside, code, ZERO_CODE)
    even, odd = tl.split(tl.reshape(code, ROWS, BLOCKSIZE // 2, 2))
    byte = rows[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    if MASKED:
        tl.store(packed + byte, ((even << 4) | odd).to(tl.uint8), mask=byte * 2 < left)
    else:
        tl.store(packed + byte, ((even << 4) | odd).to(tl.uint8))


@triton.jit
def _cells_8bit_kernel(code, signed, unsigned, cells, widest, cuts, kind, BLOCK: tl.constexpr):
    """For every cell of fp32 bits (sign, exponent from 2**-24 to 2**0, 6 bits of mantissa): ranks of its ends.

    ``cells[c] = bits | (low | high << 8) << 32``: midpoints strictly below the cell's least and greatest value, and the
    fp32 bits of the midpoint that halves what lies between; ``widest[program]``: the greatest ``high - low`` of the
    program's cells. Cell 0 of a sign reaches down to zero, the last one to infinity.

    The first program also writes ``cuts``, the midpoint below every code (NaN below the first), and ``kind``: 1 if
    ``code`` is ``signed`` to the bit, 2 if it is ``unsigned``, else 0.
    """
    if tl.program_id(0) == 0:
        all_codes = tl.arange(0, 256)
        level = tl.load(code + all_codes)
        below = (tl.load(code + tl.maximum(all_codes - 1, 0)) + level) * 0.5
        tl.store(cuts + all_codes, tl.where(all_codes == 0, float("nan"), below))
        bits = level.to(tl.int32, bitcast=True)
        other = tl.load(signed + all_codes).to(tl.int32, bitcast=True) ^ bits
        differs = tl.max((other != 0).to(tl.int32), axis=0)
        other = tl.load(unsigned + all_codes).to(tl.int32, bitcast=True) ^ bits
        differs_unsigned = tl.max((other != 0).to(tl.int32), axis=0)
        tl.store(kind, tl.where(differs == 0, 1, tl.where(differs_unsigned == 0, 2, 0)))
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    magnitude = cell & 2047
    low_bits = tl.where(magnitude == 0, 0, (magnitude << 17) + (102 << 23))
    high_bits = tl.where(magnitude == 2047, 0x7F800000, (magnitude << 17) + (102 << 23) + 0x1FFFF)
    negative = cell >= 2048
    near = low_bits.to(tl.float32, bitcast=True)
    far = high_bits.to(tl.float32, bitcast=True)
    least = tl.where(negative, -far, near)
    greatest = tl.where(negative, -near, far)
    i = tl.arange(0, 256)
    midpoint = (tl.load(code + i) + tl.load(code + tl.minimum(i + 1, 255))) * 0.5
    real = (i < 255)[None, :]
    low = tl.sum(((midpoint[None, :] < least[:, None]) & real).to(tl.int32), axis=1)
    high = tl.sum(((midpoint[None, :] < greatest[:, None]) & real).to(tl.int32), axis=1)
    middle = (low + high) >> 1
    cut = (tl.load(code + middle) + tl.load(code + tl.minimum(middle + 1, 255))) * 0.5
    bits = cut.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(cells + cell, bits | ((low | (high << 8)).to(tl.int64) << 32))
    tl.store(widest + tl.program_id(0), tl.max(high - low, axis=0))


@triton.jit
def _search_8bit(scaled, code, cells, widest, PROGRAMS: tl.constexpr):
    """Ranks in any rising map, by the cell of a value's bits."""
    key = tl.where(scaled == scaled, scaled, float("-inf"))
    bits = key.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.maximum(((bits & 0x7FFFFFFF) >> 17) - (102 << 6), 0), 2047)
    entry = tl.load(cells + (magnitude | tl.where(bits < 0, 2048, 0)))
    above = key > entry.to(tl.int32).to(tl.float32, bitcast=True)
    ranks = (entry >> 32).to(tl.int32)
    low = ranks & 255
    high = ranks >> 8
    middle = (low + high) >> 1
    open_ = low < high
    low = tl.where(open_ & above, middle + 1, low)
    high = tl.where(open_ & (above == 0), middle, high)
    # Maps for quantization have at most one midpoint in a cell; others go on halving.
    span = tl.max(tl.load(widest + tl.arange(0, PROGRAMS)), axis=0) // 2
    while span > 0:
        middle = (low + high) >> 1
        midpoint = (tl.load(code + middle) + tl.load(code + tl.minimum(middle + 1, 255))) * 0.5
        above = key > midpoint
        open_ = low < high
        low = tl.where(open_ & above, middle + 1, low)
        high = tl.where(open_ & (above == 0), middle, high)
        span = span // 2
    return low


@triton.jit
def _quantize_blockwise_kernel(
    values, codes, absmax, code, cells, widest, cuts, kind, blocksize, numel,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr, MASKED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """8-bit codes and absmax of ROWS blocks of up to WIDTH values (``blocksize``, where it is no power of two).

    The code of a dynamic map is found by arithmetic, right or one too high, and one comparison with the midpoint below.
    MASKED: the last program or the blocks are not full.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS
    values += row * blocksize
    codes += row * blocksize
    rows = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    if MASKED:
        left = tl.minimum(numel - row * blocksize, ROWS * blocksize).to(tl.int32)
        place = rows[:, None] * blocksize + column
        inside = (place < left) & (column < blocksize)
        loaded = tl.load(values + place, mask=inside, other=0.0)
    else:
        place = rows[:, None] * WIDTH + column
        loaded = tl.load(values + place)
    scaled, scales = _scale_rows(loaded.to(tl.float32))
    if MASKED:
        tl.store(absmax + row + rows, scales, mask=rows * blocksize < left)
    else:
        tl.store(absmax + row + rows, scales)
    map_kind = tl.load(kind)
    if map_kind == 1:
        # The maximum with a number turns NaN into the lowest rank.
        key = tl.maximum(scaled, -1.0)
        rank = _guess(key, SIGNED, PTX)
        rank -= (key <= _entries(cuts, rank, ROWS, WIDTH)).to(tl.int32)
    elif map_kind == 2:
        key = tl.maximum(scaled, 0.0)
        rank = _guess(key, UNSIGNED, PTX)
        rank -= (key <= _entries(cuts, rank, ROWS, WIDTH)).to(tl.int32)
    else:
        rank = _search_8bit(scaled, code, cells, widest, PROGRAMS)
    if MASKED:
        tl.store(codes + place, rank.to(tl.uint8), mask=inside)
    else:
        tl.store(codes + place, rank.to(tl.uint8))
