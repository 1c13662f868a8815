"""Rows of a packed 4-bit table by their number, in plain Triton."""

import triton
import triton.language as tl

__all__ = ["_embedding_4bit_kernel"]


@triton.jit
def _embedding_4bit_kernel(
    indices, packed, absmax, absmax_8bit, absmax_code, absmax_offset, pairs, out, rows, columns, row_tiles,
    BLOCKSIZE: tl.constexpr, LANES: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """``out[i] = levels(codes of row indices[i]) * absmax``; NaN for a number that is no row's.

    A program takes 8*LANES neighbours of one row, 4 bytes and 8 values a lane. ``columns`` is a multiple of 8, so that
    a lane's values share a block. ``pairs`` holds the two fp32 levels of every byte as one 64-bit word. The product is
    taken in fp32 and rounded once; fusing the nested scale's multiply and add is off at launch.
    """
    place = (tl.program_id(0) // row_tiles).to(tl.int64)
    first = (tl.program_id(0) % row_tiles) * (8 * LANES)
    row = tl.load(indices + place).to(tl.int64)
    there = (row >= 0) & (row < rows)
    start = tl.where(there, row, 0) * columns + first
    lane = tl.arange(0, LANES)
    inside = first + lane * 8 < columns
    byte = lane[:, None] * 4 + tl.arange(0, 4)[None, :]
    value = lane[:, None] * 8 + tl.arange(0, 8)[None, :]
    codes = tl.load(packed + start // 2 + byte, mask=first + byte * 2 < columns, other=0).to(tl.int32)
    index = (start + lane * 8) // BLOCKSIZE
    if NESTED:
        q = tl.load(absmax_8bit + index, mask=inside, other=0).to(tl.int32)
        scale = tl.load(absmax_code + q) * tl.load(absmax + index // 256, mask=inside, other=0.0)
        scale += tl.load(absmax_offset)
    else:
        scale = tl.load(absmax + index, mask=inside, other=0.0)
    scale = tl.where(there, scale, float("nan"))
    pair = tl.load(pairs + codes)
    dtype: tl.constexpr = out.dtype.element_ty
    even = pair.to(tl.int32).to(tl.float32, bitcast=True) * scale[:, None]
    odd = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True) * scale[:, None]
    tl.store(
        out + place * columns + first + value,
        tl.interleave(even.to(dtype), odd.to(dtype)),
        mask=first + value < columns,
    )
