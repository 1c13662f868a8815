"""Scaling by block and encoding by sorted midpoints: what quantization means, once for 4 and 8 bits."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from halfbyte.formats import blocks
from halfbyte.formats.codebook import Codebook, codebook

__all__ = ["CHUNK", "encode", "midpoints_of", "pieces", "scale_blocks", "spread", "table_of"]

CHUNK = 1 << 22
"""Values worked on at a time, a multiple of every 4-bit block size: temporaries stay small beside a large weight."""

_TINY = 2.0**-100
_BOOST = 2.0**100


def pieces(numel: int, blocksize: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of whole blocks that cover ``numel`` values."""
    step = max(1, CHUNK // blocksize) * blocksize
    for start in range(0, numel, step):
        yield start, min(numel, start + step)


def scale_blocks(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Values over their block's absmax, and the absmax.

    Multiplies by the fp32 reciprocal, as stored checkpoints were made. Blocks so small that the reciprocal would
    overflow are first scaled up by an exact power of two. A zero block scales to zeros; a block with NaN has absmax
    NaN, a block with inf has absmax inf.

    Args:
        values: fp32, flat.
        blocksize: Values per block; the last block may be short.

    Returns:
        fp32 scaled values of the same length, and fp32 absmax of shape ``(blocks,)``.
    """
    numel = values.numel()
    count = blocks.block_count(numel, blocksize)
    padded = torch.nn.functional.pad(values, (0, count * blocksize - numel)).view(count, blocksize)
    absmax = padded.abs().amax(dim=1)
    boost = torch.where(absmax < _TINY, _BOOST, 1.0)
    reciprocal = torch.where(absmax == 0, 0.0, 1.0 / (absmax * boost))
    scaled = (padded * boost[:, None]).mul_(reciprocal[:, None])
    return scaled.view(-1)[:numel], absmax


def encode(scaled: Tensor, midpoints: Tensor) -> Tensor:
    """Index of the nearest of the sorted levels that ``midpoints`` separate; ties go down, NaN to 0. uint8."""
    ranks = torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8)
    return torch.where(scaled.isnan(), 0, ranks)


def encode_book(scaled: Tensor, book: Codebook) -> Tensor:
    """Codes of ``book`` nearest to ``scaled``: by value, or by magnitude and sign where the format has a sign bit."""
    midpoints = torch.from_numpy(book.midpoints).to(scaled.device)
    if book.sign_bit is None:
        ranks = encode(scaled, midpoints)
    else:
        # Ties take the lower value: one ulp more for negative values makes "strictly below" an "at most".
        magnitude = scaled.abs()
        above = torch.nextafter(magnitude, torch.full_like(magnitude, torch.inf))
        ranks = encode(torch.where(scaled < 0, above, magnitude), midpoints)
    if book.rank_to_code != tuple(range(len(book.rank_to_code))):
        ranks = torch.tensor(book.rank_to_code, dtype=torch.uint8, device=scaled.device)[ranks.int()]
    if book.sign_bit is not None:
        ranks |= (scaled < 0).to(torch.uint8) << book.sign_bit
    return ranks


def midpoints_of(code: Tensor) -> Tensor:
    """fp32 midpoints between neighbours of a rising map."""
    return (code[:-1] + code[1:]) * 0.5


@functools.lru_cache(maxsize=32)
def table_of(name: str, device: torch.device) -> Tensor:
    """fp32 levels of a registered codebook on ``device``, in code order. Shared: never hand it out."""
    with torch.inference_mode(False):
        return torch.from_numpy(codebook(name).table).to(device)


def spread(absmax: Tensor, blocksize: int, numel: int) -> Tensor:
    """The absmax of every value, fp32 ``(numel,)``."""
    return absmax.repeat_interleave(blocksize)[:numel]
