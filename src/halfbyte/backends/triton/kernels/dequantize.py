"""Dequantization in plain Triton: 4-bit with plain or nested absmax, and 8-bit blockwise."""

import triton
import triton.language as tl

__all__ = ["_dequantize_4bit_kernel", "_dequantize_blockwise_kernel"]


@triton.jit
def _dequantize_4bit_kernel(
    packed, absmax, absmax_8bit, absmax_code, absmax_offset, pairs, out, cols, first_col, slice_cols, row_tiles, end,
    BLOCKSIZE: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """``out[r, c] = level(code[r, first_col + c]) * absmax`` for ``slice_cols`` columns of rows of ``cols`` codes.

    A program takes TILES tiles of 8*LANES neighbours of one row: 4 bytes and 8 values a lane. ``pairs`` holds the two
    fp32
    levels of every byte as one 64-bit word. ``first_col``, and ``cols`` of several rows, are multiples of 8; ``end``
    is the
    number of codes in all.
    The product is taken in fp32 and rounded once; fusing the nested scale's multiply and add is off at launch.
    """
    TILE: tl.constexpr = 8 * LANES
    row = (tl.program_id(0) // row_tiles).to(tl.int64)
    first = (tl.program_id(0) % row_tiles).to(tl.int64) * (TILE * TILES)
    start = row * cols + first_col + first
    packed += start // 2
    out += row * slice_cols + first
    block = start // BLOCKSIZE
    shift = (start % BLOCKSIZE).to(tl.int32)
    left = tl.minimum(tl.minimum(slice_cols - first, end - start), TILE * TILES).to(tl.int32)
    lane = tl.arange(0, LANES)
    byte = lane[:, None] * 4 + tl.arange(0, 4)[None, :]
    value = lane[:, None] * 8 + tl.arange(0, 8)[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    if NESTED:
        offset = tl.load(absmax_offset)
    for tile in tl.static_range(TILES):
        here = tile * TILE
        # Bytes are read where their first code is inside; an odd count leaves its last byte half used.
        codes = tl.load(packed + here // 2 + byte, mask=byte < (left - here + 1) // 2, other=0).to(tl.int32)
        index = block + (shift + here + lane * 8) // BLOCKSIZE
        inside = lane * 8 < left - here
        if NESTED:
            q = tl.load(absmax_8bit + index, mask=inside, other=0).to(tl.int32)
            scale = tl.load(absmax_code + q) * tl.load(absmax + index // 256, mask=inside, other=0.0) + offset
        else:
            scale = tl.load(absmax + index, mask=inside, other=0.0)
        pair = tl.load(pairs + codes)
        even = pair.to(tl.int32).to(tl.float32, bitcast=True) * scale[:, None]
        odd = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True) * scale[:, None]
        tl.store(out + here + value, tl.interleave(even.to(dtype), odd.to(dtype)), mask=value < left - here)


@triton.jit
def _dequantize_blockwise_kernel(
    codes, absmax, code, out, blocksize, numel, LANES: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr
):
    """``out[i] = code[codes[i]] * absmax[i // blocksize]``; WIDTH neighbours, a divisor of ``blocksize``, a lane."""
    start = tl.program_id(0).to(tl.int64) * (LANES * WIDTH * TILES)
    codes += start
    out += start
    block = start // blocksize
    shift = (start % blocksize).to(tl.int32)
    left = tl.minimum(numel - start, LANES * WIDTH * TILES).to(tl.int32)
    lane = tl.arange(0, LANES)
    place = lane[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    for tile in tl.static_range(TILES):
        here = tile * LANES * WIDTH
        inside = place < left - here
        q = tl.load(codes + here + place, mask=inside, other=0).to(tl.int32)
        index = block + (shift + here + lane * WIDTH) // blocksize
        scale = tl.load(absmax + index, mask=lane * WIDTH < left - here, other=0.0)
        value = tl.load(code + q) * scale[:, None]
        tl.store(out + here + place, value.to(out.dtype.element_ty), mask=inside)
