"""Facts and small constant tensors per device: architecture, multiprocessors, decode tables of the codebooks."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halfbyte.errors import UnsupportedError
from halfbyte.formats.codebook import Codebook, codebook
from halfbyte.formats.dynamic import dynamic_map

__all__ = [
    "CELLS_4BIT",
    "Cells",
    "Gpu",
    "cell_table_of",
    "cells_of",
    "dynamic_maps_of",
    "gpu_of",
    "levels_of",
    "pairs_of",
    "rounded_pairs",
    "rounded_pairs_of",
    "words_of",
]

CELLS_4BIT = 128
"""Entries of the table that quantize_4bit looks its cells up in."""


@dataclass(frozen=True)
class Gpu:
    """What the launchers need to know of one GPU.

    Attributes:
        arch: ``"sm_90"`` or, on AMD, ``"gfx942"``: the name of its tuning file.
        multiprocessors: How many programs run side by side at least.
        l2_bytes: Size of the level-2 cache.
        gluon: Whether the Gluon kernels (mma.sync with bf16) run on it.
    """

    arch: str
    multiprocessors: int
    l2_bytes: int
    gluon: bool


@functools.lru_cache(maxsize=64)
def gpu_of(index: int) -> Gpu:
    """Facts of the GPU with that index."""
    properties = torch.cuda.get_device_properties(index)
    l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 4 << 20
    if torch.version.hip is not None:
        arch = str(getattr(properties, "gcnArchName", "gfx")).split(":")[0]
        return Gpu(arch, properties.multi_processor_count, l2_bytes, gluon=False)
    arch = f"sm_{properties.major}{properties.minor}"
    return Gpu(arch, properties.multi_processor_count, l2_bytes, gluon=properties.major >= 8)


def _constant(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]], index: int) -> Tensor:
    """``values`` on a GPU, in memory of a stream of its own: no CUDA graph's pool may own what outlives the graph."""
    device = torch.device("cuda", index)
    stream = torch.cuda.Stream(device)
    with torch.inference_mode(False), torch.cuda.stream(stream):
        constant = torch.from_numpy(values).to(device)
    stream.synchronize()
    return constant


def rounded_pairs(name: str, dtype: torch.dtype) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """The two levels of every byte, rounded to a 16-bit ``dtype``, as one int32: the even element's in the low half.

    >>> hex(int(rounded_pairs("nf4", torch.bfloat16)[0x7F]))
    '0x3f800000'
    """
    bits = torch.from_numpy(codebook(name).table).to(dtype).view(torch.int16).numpy().view(np.uint16)
    byte = np.arange(256)
    return np.ascontiguousarray(np.stack([bits[byte >> 4], bits[byte & 15]], axis=1)).view("<i4").reshape(256)


@functools.lru_cache(maxsize=64)
def rounded_pairs_of(name: str, dtype: torch.dtype, index: int) -> Tensor:
    """:func:`rounded_pairs` on that GPU."""
    return _constant(rounded_pairs(name, dtype), index)


@functools.lru_cache(maxsize=64)
def words_of(name: str, dtype: torch.dtype) -> tuple[int, ...]:
    """The 16 levels rounded to a 16-bit ``dtype``, as 8 signed 32-bit words: 16 high bytes, then 16 low bytes.

    >>> hex(words_of("nf4", torch.bfloat16)[0] & 0xFFFFFFFF)
    '0xbebfbfbf'
    """
    bits = torch.from_numpy(codebook(name).table).to(dtype).view(torch.int16).numpy().astype(np.uint16)
    planes = np.concatenate([(bits >> 8).astype(np.uint8), (bits & 0xFF).astype(np.uint8)])
    return tuple(int(word) for word in planes.view("<i4"))


@functools.lru_cache(maxsize=64)
def levels_of(name: str, index: int) -> Tensor:
    """fp32 levels in code order, ``(16,)``, on that GPU."""
    return _constant(codebook(name).table.copy(), index)


@functools.lru_cache(maxsize=64)
def pairs_of(name: str, index: int) -> Tensor:
    """The two fp32 levels of every byte, ``(256,)`` int64: the even element's (high nibble) in the low half."""
    table = codebook(name).table
    byte = np.arange(256)
    pairs = np.stack([table[byte >> 4], table[byte & 15]], axis=1).astype("<f4")
    return _constant(np.ascontiguousarray(pairs).view("<i8").reshape(256), index)


@functools.lru_cache(maxsize=64)
def dynamic_maps_of(index: int) -> tuple[Tensor, Tensor]:
    """The signed and the unsigned dynamic map, fp32 ``(256,)`` each, on that GPU."""
    return _constant(dynamic_map(), index), _constant(dynamic_map(signed=False), index)


@dataclass(frozen=True)
class Cells:
    """A codebook's uniform cells: entries ``midpoint bits | (code below | code above << 4) << 32``, and their width."""

    entries: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
    per_unit: float


def cells_of(book: Codebook) -> Cells:
    """The cells in which :func:`quantize_4bit` finds codes: the coarsest with at most one midpoint each.

    Raises:
        UnsupportedError: Two midpoints lie closer together than the finest cells are wide.

    >>> cells_of(codebook("nf4")).per_unit
    16.0
    """
    signed = book.sign_bit is None
    for per_unit in (8.0, 16.0, 32.0):
        entries = _cells(book, per_unit, CELLS_4BIT // 2 if signed else 0)
        if entries is not None:
            return Cells(entries, per_unit)
    raise UnsupportedError(f"the midpoints of {book.name!r} lie too close together for the GPU's table")


def _cells(book: Codebook, per_unit: float, origin: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
    midpoints = book.midpoints.astype(np.float64)
    codes = book.rank_to_code
    entries = np.zeros(CELLS_4BIT, np.int64)
    for cell in range(CELLS_4BIT):
        low, high = (cell - origin - 0.5) / per_unit, (cell - origin + 0.5) / per_unit
        inside = np.flatnonzero((midpoints >= low) & (midpoints <= high))
        if len(inside) > 1:
            return None
        rank = int((midpoints < low).sum())
        above = min(rank + len(inside), len(codes) - 1)
        cut = book.midpoints[inside[0]] if len(inside) else np.float32(np.inf)
        bits = int(np.float32(cut).view(np.uint32))
        entries[cell] = bits | (codes[rank] | codes[above] << 4) << 32
    return entries


@functools.lru_cache(maxsize=64)
def cell_table_of(name: str, index: int) -> tuple[Tensor, float]:
    """:func:`cells_of` a registered codebook on that GPU: its entries and its cells per unit."""
    cells = cells_of(codebook(name))
    return _constant(cells.entries, index), cells.per_unit
