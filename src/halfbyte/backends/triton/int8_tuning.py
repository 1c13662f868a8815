"""Which tile an int8 product runs with: measured entries per architecture from ``tuning/int8_*.json``, else a rule."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

from halfbyte.backends.triton.device import Gpu
from halfbyte.backends.triton.tuning import distance, shipped
from halfbyte.errors import ArgumentError

__all__ = ["LARGEST_ROW", "Entry", "Tile", "closed_form", "read", "tile_for"]

KINDS = ("row", "pointer")

LARGEST_ROW = 32768
"""Codes of a row that the kernel of one activation row holds in registers."""


@dataclass(frozen=True)
class Tile:
    """One configuration of the int8 products.

    Attributes:
        kind: ``"row"``: one activation row, quantized in every program, without tensor cores; ``"pointer"``: tensor
            cores.
        m: Rows of the output in a tile.
        n: Columns of the output in a tile.
        k: Codes of a row in one step; of the kind "row", all.
        group: Rows of tiles that share weights in the cache.
        warps: Warps of a program.
        stages: Steps in shared memory or on their way there; of the kind "row", programs a multiprocessor.
    """

    kind: str
    m: int
    n: int
    k: int
    group: int = 8
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ArgumentError(f"a tile's kind is {self.kind!r}", expected=f"one of {', '.join(KINDS)}")
        for name in ("m", "n", "k", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ArgumentError(f"a tile's {name} is {value}", expected="a power of two")
        if self.kind == "row" and self.m > 1:
            raise ArgumentError(f"a tile of {self.m} rows", expected="1")
        if self.kind == "pointer" and (self.m < 16 or self.n < 16 or self.k < 32):
            raise ArgumentError(f"{self}", expected="at least 16 x 16 x 32 for tensor cores")


@dataclass(frozen=True)
class Entry:
    """A measured choice: the best tile for a batch bucket at one shape."""

    batch: int
    n: int
    k: int
    tile: Tile


@functools.lru_cache(maxsize=16)
def read(arch: str) -> tuple[Entry, ...]:
    """The measured entries of an architecture; none where nothing was measured."""
    text = shipped(f"int8_{arch}")
    if text is None:
        return ()
    document: dict[str, Any] = json.loads(text)
    return tuple(
        Entry(int(item["batch"]), int(item["n"]), int(item["k"]), Tile(**item["tile"])) for item in document["tiles"]
    )


@functools.lru_cache(maxsize=4096)
def tile_for(gpu: Gpu, batch: int, n: int, k: int) -> Tile:
    """The tile for that many rows: the nearest measured shape's, if within a factor of two, or the closed form."""
    entries = read(gpu.arch)
    sizes = sorted({entry.batch for entry in entries})
    bucket = next((size for size in sizes if size >= batch), sizes[-1] if sizes else 0)
    near = [entry for entry in entries if entry.batch == bucket]
    if near:
        best = min(near, key=lambda entry: distance(n, k, entry.n, entry.k))
        if distance(n, k, best.n, best.k) <= 1.0 and (best.tile.kind == "pointer" or k % 16 == 0):
            return best.tile
    return closed_form(gpu, batch, n, k)


def closed_form(gpu: Gpu, batch: int, n: int, k: int) -> Tile:
    """A tile for any shape on any GPU: enough programs for every multiprocessor, within 99 KiB of shared memory.

    >>> closed_form(Gpu("sm_89", 128, 72 << 20, gluon=True), 1, 4096, 4096).kind
    'row'
    """
    if batch == 1 and k % 16 == 0 and k <= LARGEST_ROW:
        # 64 words of four codes a thread.
        words = max(128, 1 << (k // 4 - 1).bit_length())
        warps = 4 if words <= 1024 else 8 if words <= 4096 else 16
        return Tile("row", 1, min(16, 64 * 32 * warps // words), 64, 1, warps, 2 if words <= 1024 else 1)
    if batch <= 16:
        return Tile("pointer", 16, 32 if n < 64 * gpu.multiprocessors else 64, 256, 1, 4, 4)
    if batch <= 32:
        return Tile("pointer", 32, 32 if n < 64 * gpu.multiprocessors else 64, 256, 4, 4, 3)
    if batch <= 64:
        return Tile("pointer", 64, 64, 128, 4, 4, 3)
    if batch <= 512:
        return Tile("pointer", 64, 128, 128, 8, 4, 4)
    return Tile("pointer", 128, 128, 128, 8, 4, 3)
