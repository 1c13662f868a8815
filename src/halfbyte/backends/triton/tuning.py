"""Which tile a product runs with: measured entries per architecture from ``tuning/*.json``, else a closed form."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

from halfbyte import _env
from halfbyte.backends.triton.device import Gpu
from halfbyte.errors import ArgumentError

__all__ = [
    "FUSED_BATCHES",
    "STEP",
    "Tile",
    "backward_tile_for",
    "closed_form",
    "distance",
    "fused_up_to",
    "read",
    "shipped",
    "tile_for",
]

FUSED_BATCHES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Batch buckets: rows of activations that tiles of the fused kernels are measured for."""

KINDS = ("register", "staged", "warpgroup", "decoded")

STEP = 64
"""Terms of the sum that a "decoded" tile takes at a time."""


@dataclass(frozen=True)
class Tile:
    """One configuration of the fused kernels.

    Attributes:
        kind: ``"register"``: the weight goes straight to registers, for batches of up to 16; ``"staged"``: weight and
            activation through shared memory; ``"warpgroup"``: the same with wgmma (Hopper); ``"decoded"``: weight
            decoded into shared memory by warps of their own (Hopper).
        batch: Rows of activations of a program (BM).
        rows: Weight rows of a program (BN), a multiple of 16 times ``n_warps``.
        unroll: Groups of 64 columns in an iteration (U); of a decoded tile: steps whose words come at once.
        k_warps: Warps that share the K axis (KW).
        n_warps: Warps that share the rows (NW).
        split: Programs that share the K axis.
        stages: Iterations in shared memory or on their way there; of the register kernel: iterations loaded ahead,
            or 3 and 4 for 1 and 2 with two iterations in turn.
        table: Decode by the table in shared memory, else by byte permutation.
        producers: Groups of four warps that decode, 1 or 2 (decoded tiles).
    """

    kind: str
    batch: int
    rows: int
    unroll: int
    k_warps: int
    n_warps: int
    split: int
    stages: int
    table: bool = True
    producers: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "rows", "unroll", "k_warps", "n_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ArgumentError(f"a tile's {name} is {value}", expected="a power of two")
        if self.kind not in KINDS:
            raise ArgumentError(f"a tile's kind is {self.kind!r}", expected=f"one of {', '.join(KINDS)}")
        if self.rows % (16 * self.n_warps):
            raise ArgumentError(
                f"a tile of {self.rows} rows for {self.n_warps} warps", expected="a multiple of 16 rows a warp"
            )
        if self.k_warps * self.n_warps > 16:
            raise ArgumentError(f"a tile of {self.k_warps}x{self.n_warps} warps", expected="at most 16 warps")
        if self.unroll > 4 or self.split < 1 or not 0 <= self.stages <= 16:
            raise ArgumentError(f"{self}", expected="unroll up to 4, split 1 or more, up to 16 stages")
        if self.kind in ("warpgroup", "decoded") and (self.k_warps > 1 or self.n_warps % 4):
            raise ArgumentError(f"{self}", expected="whole warpgroups of 4 warps, none of them sharing K")
        if self.kind == "decoded" and (
            self.stages % 2
            or self.stages < 2 * self.producers
            or (self.rows, self.unroll, self.producers) not in ((128, 4, 1), (128, 2, 2))
        ):
            expected = "128 rows, a producer of 4 or two of 2 steps, an even number of stages, two a producer"
            raise ArgumentError(f"{self}", expected=expected)

    def shared_bytes(self, pair: int = 2) -> int:
        """Dynamic shared memory that the buffers take, in groups of ``32 * pair`` columns."""
        if self.kind == "decoded":
            # Packed words of two groups of steps a producer, and the ring.
            words = 2 * self.producers * self.unroll * self.rows * STEP // 2
            return words + self.stages * (self.rows + self.batch) * STEP * 2
        if self.kind == "register":
            return self.k_warps * self.rows * self.batch * 4
        columns = 32 * pair * self.unroll * self.k_warps
        activation = self.batch * columns * 2 if self.kind == "warpgroup" or self.batch > 16 else 0
        return self.stages * (self.rows * columns // 2 + activation)


@dataclass(frozen=True)
class Entry:
    """A measured choice: the best tile for a batch bucket at one shape."""

    batch: int
    n: int
    k: int
    tile: Tile


@dataclass(frozen=True)
class Table:
    """One tuning file: measured entries, and up to which batch the fused kernels beat slices at each shape.

    Attributes:
        entries: Of products with the weight's transpose, the forward.
        fused: (n, k, batch) of the forward.
        fused_backward: As ``fused``, of the gradient's product with the weight.
    """

    device: str
    entries: tuple[Entry, ...]
    fused: tuple[tuple[int, int, int], ...]
    fused_backward: tuple[tuple[int, int, int], ...] = ()


def _entries(items: list[dict[str, Any]]) -> tuple[Entry, ...]:
    return tuple(Entry(int(item["batch"]), int(item["n"]), int(item["k"]), Tile(**item["tile"])) for item in items)


def _limits(items: list[dict[str, Any]]) -> tuple[tuple[int, int, int], ...]:
    return tuple((int(item["n"]), int(item["k"]), int(item["up_to"])) for item in items)


def _parse(text: str) -> Table:
    document: dict[str, Any] = json.loads(text)
    return Table(
        str(document["device"]),
        _entries(document["tiles"]),
        _limits(document["fused"]),
        _limits(document.get("fused_backward", [])),
    )


def shipped(name: str) -> str | None:
    """The text of a tuning file of ours, ``tuning/NAME.json``; None where there is none."""
    file = resources.files("halfbyte.backends.triton") / "tuning" / f"{name}.json"
    return file.read_text(encoding="utf-8") if file.is_file() else None


@functools.lru_cache(maxsize=16)
def read(arch: str) -> Table | None:
    """The tuning table of an architecture: the user's own (``halfbyte bench tune``) before ours; None without either.

    Ours serves for shapes and batches that the user's own does not have, and for the backward, which that command does
    not measure.

    Raises:
        ArgumentError: The user's own cannot be read.
    """
    text = shipped(arch)
    ours = None if text is None else _parse(text)
    path = _env.cache_dir() / "tuning" / f"{arch}.json"
    if not path.is_file():
        return ours
    try:
        own = _parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"{path} is no tuning file: {error!r}",
            expected="what `halfbyte bench tune` writes",
            hint="delete it, or run: halfbyte bench tune",
        ) from None
    if ours is None:
        return own
    # The first of several that are as near is taken.
    return Table(
        own.device,
        own.entries + ours.entries,
        own.fused + ours.fused,
        own.fused_backward + ours.fused_backward,
    )


def distance(n: int, k: int, other_n: int, other_k: int) -> float:
    """How far a shape is from another, in factors of two.

    >>> distance(4096, 4096, 14336, 2048) > distance(4096, 4096, 8192, 4096)
    True
    """
    return abs(math.log2(n / other_n)) + abs(math.log2(k / other_k))


@functools.lru_cache(maxsize=4096)
def tile_for(gpu: Gpu, batch: int, n: int, k: int) -> Tile:
    """The tile for a batch bucket: the nearest measured shape's, if within a factor of two, or the closed form."""
    table = read(gpu.arch)
    tile = None if table is None else _nearest(table.entries, batch, n, k, 1.0)
    return closed_form(gpu, batch, n, k) if tile is None else tile


@functools.lru_cache(maxsize=4096)
def backward_tile_for(gpu: Gpu, m: int, n: int, k: int) -> Tile | None:
    """The tile of ``grad @ weight`` for ``m`` rows, None where slices of dequantized weight serve better or alone
    can."""
    table = read(gpu.arch)
    if gpu.arch != "sm_90" or table is None or not table.fused_backward or m > _limit(table.fused_backward, n, k):
        return None
    return decoded_form(gpu, m, k, n)


def _nearest(entries: tuple[Entry, ...], batch: int, n: int, k: int, within: float) -> Tile | None:
    near = [entry for entry in entries if entry.batch == batch]
    if not near:
        return None
    best = min(near, key=lambda entry: distance(n, k, entry.n, entry.k))
    return best.tile if distance(n, k, best.n, best.k) <= within else None


def _limit(limits: tuple[tuple[int, int, int], ...], n: int, k: int) -> int:
    return min(limits, key=lambda item: distance(n, k, item[0], item[1]))[2]


def closed_form(gpu: Gpu, batch: int, n: int, k: int) -> Tile:
    """A tile for any shape on any GPU: enough programs for every multiprocessor, K shared by the warps of a program.

    >>> closed_form(Gpu("sm_89", 128, 72 << 20, gluon=True), 8, 4096, 4096).k_warps
    4
    """
    if batch <= 16:
        lonely = -(-n // 16) < gpu.multiprocessors and k >= 2048  # fewer programs than could run: wider ones
        k_warps = 8 if k >= 8192 or lonely else 4
        return Tile("register", max(batch, 8), 16 if batch <= 8 else 32, 4, k_warps, 1, 1, 1)
    if gpu.arch == "sm_90" and batch > 32:
        return decoded_form(gpu, batch, n, k)
    programs = -(-n // 64)
    split = max(1, min(8, 2 * gpu.multiprocessors // programs, k // 1024))
    if gpu.arch == "sm_90":
        return Tile("warpgroup", 32, 64, 2, 1, 4, split, 2, table=False)
    return Tile(
        "staged", min(batch, 64), 64, 2 if batch == 32 else 1, 1, 4 if batch == 32 else 2, split, 3, table=False
    )


def decoded_form(gpu: Gpu, batch: int, width: int, terms: int) -> Tile:
    """The decoded tile of a product: as many slices of the sum as its programs fit the multiprocessors at once.

    Args:
        gpu: A Hopper GPU.
        batch: Rows of activations.
        width: Columns of the result.
        terms: Terms of each sum.

    >>> decoded_form(Gpu("sm_90", 132, 50 << 20, gluon=True), 100, 4096, 14336).split
    4
    """
    rows = next((size for size in (16, 32, 64, 128) if batch <= size), 256)
    programs = -(-width // 128) * -(-batch // rows)
    most = min(8, gpu.multiprocessors // programs, terms // (8 * STEP))
    # Five and seven were no better than four and six.
    split = max(size for size in (1, 2, 3, 4, 6, 8) if size <= max(1, most))
    if rows == 256:
        return Tile("decoded", rows, 128, 4, 1, 8, split, 4, table=False)
    return Tile("decoded", rows, 128, 2, 1, 8 if rows == 128 else 4, split, 6, table=False, producers=2)


def fused_up_to(gpu: Gpu, n: int, k: int) -> int:
    """The largest batch for which the fused kernels beat slices of dequantized weight."""
    table = read(gpu.arch)
    return _limit(table.fused, n, k) if table is not None and table.fused else 64
