"""Products with a packed 4-bit weight on the CPU: fused for few activations, by slices for many, and the gradient."""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.backends.cpu import host, memory, tables, threads
from halfbyte.backends.cpu.call import DTYPES, kernel
from halfbyte.backends.cpu.four_bit import Scales, decode
from halfbyte.backends.cpu.kernels import tiles
from halfbyte.backends.cpu.kernels.level import CHUNK
from halfbyte.backends.cpu.kernels.product import ROWS
from halfbyte.backends.registry import implements

__all__ = ["gemm_4bit", "gemm_4bit_dgrad", "gemv_4bit", "tiles_in_use"]

SLICE_BYTES = 16 << 20
"""Dequantized weight worked on at a time: little memory, yet few calls of torch's product (some 50 µs each)."""

PANEL_BYTES = 16 << 10
"""Activations that a tile works on at a time: half of the smallest first-level cache."""

FUSED_BATCH = {
    ("avx512bf16", torch.bfloat16): 16,
    ("avx512bf16", torch.float32): 48,
    ("avx512", torch.bfloat16): 16,
    ("avx512", torch.float32): 48,
    ("avx2", torch.float32): 32,
    ("neon", torch.float32): 16,
    ("portable", torch.float32): 4,
}
"""Up to this many activations the fused product is taken, by level and by what slices would be multiplied in.

Measured by ``benchmarks/cpu_tune.py`` on Sapphire Rapids and Zen 3; the other levels are guesses by lanes."""

ROWS_BATCH = 4
PAIRS, TOGETHER, AHEAD = False, 4, 0
TILED_BATCH = 5
HIGH, WIDE, UNROLL = 2, 2, 4
PANEL, PANEL_MANY, GROUP_ROWS = 4, 8, 128


@implements("cpu", "gemm_4bit")
def gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """``A @ weight.T + bias``; the weight is never dequantized as a whole."""
    out = memory.empty((*A.shape[:-1], shapeB[0]), A.dtype)
    scales = Scales(absmax, absmax_8bit, absmax_code, absmax_offset)
    _product(A, B, shapeB, scales, blocksize, tables.lookup_of(quant_type), bias, out)
    return out


@implements("cpu", "gemv_4bit")
def gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """``A @ weight.T`` with the 16 levels given as a tensor."""
    out = memory.empty((*A.shape[:-1], shapeB[0]), A.dtype)
    table = tables.lookup(code.detach().contiguous().numpy().tobytes())
    _product(A, B, shapeB, Scales(absmax), blocksize, table, None, out)
    return out


@implements("cpu", "gemv_4bit.out")
def gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor
) -> None:
    """:func:`gemv_4bit` into ``out``."""
    out.copy_(gemv_4bit(A, B, shapeB, absmax, code, blocksize))


def _product(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    scales: Scales,
    blocksize: int,
    table: tables.Table,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    rows, columns = shapeB
    if not out.numel():
        return
    if not columns:
        out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        return
    activations = A.detach().reshape(-1, columns)
    if bias is not None:
        bias = bias.detach().contiguous()
    weight = B.detach().contiguous()
    if _takes_tiles(activations) and columns % CHUNK == 0:
        _tiled(activations, weight, rows, scales, blocksize, table, bias, out)
    elif activations.shape[0] <= _fused_batch(out.dtype) and columns % CHUNK == 0:
        _fused(activations, weight, rows, scales, blocksize, table, bias, out)
    else:
        _sliced(activations, weight, rows, scales, blocksize, table, bias, out.view(-1, rows))


def _fused(
    activations: Tensor,
    weight: Tensor,
    rows: int,
    scales: Scales,
    blocksize: int,
    table: tables.Table,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    batch, columns = activations.shape
    dtype = DTYPES[activations.dtype]
    if batch <= ROWS_BATCH and columns % (2 * CHUNK) == 0 and host.level().lanes == 16:
        _by_rows(activations, weight, rows, scales, blocksize, table, bias, out)
        return
    tile = _tile(batch)
    count = -(-batch // tile)
    chunks = columns // CHUNK
    if activations.stride(1) != 1:
        activations = activations.contiguous()
    prepared = torch.empty(
        count * tile * columns, dtype=torch.bfloat16 if host.level().kind(dtype) == "dot" else torch.float32
    )
    if batch % tile:
        prepared.zero_()
    kernel("prepare", dtype=dtype, tile=tile)(
        batch, activations.data_ptr(), prepared.data_ptr(), activations.stride(0) * activations.element_size(), chunks
    )
    a_piece = -(-rows // (ROWS * 8 * threads.count())) * ROWS
    kernel("product_4bit", dtype=dtype, nested=scales.nested, halves=blocksize < CHUNK, tile=tile)(
        -(-rows // a_piece),
        weight.data_ptr(),
        prepared.data_ptr(),
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        table.address,
        *scales.addresses,
        max(0, blocksize.bit_length() - CHUNK.bit_length()),
        rows,
        chunks,
        batch,
        count,
        max(1, PANEL_BYTES // (tile * CHUNK * prepared.element_size())),
        a_piece,
    )


def _by_rows(
    activations: Tensor,
    weight: Tensor,
    rows: int,
    scales: Scales,
    blocksize: int,
    table: tables.Table,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    batch, columns = activations.shape
    dtype, groups = DTYPES[activations.dtype], columns // 128
    pairs = PAIRS and dtype == "bf16"
    if activations.stride(1) != 1:
        activations = activations.contiguous()
    prepared = torch.empty(batch * columns, dtype=torch.bfloat16 if pairs else torch.float32)
    kernel("prepare_rows", dtype=dtype, pairs=pairs, tile=batch)(
        batch, activations.data_ptr(), prepared.data_ptr(), activations.stride(0) * activations.element_size(), groups
    )
    together = TOGETHER
    a_piece = -(-rows // (together * 8 * threads.count())) * together
    kernel(
        "product_rows",
        dtype=dtype,
        nested=scales.nested,
        blocks=max(1, 128 // blocksize),
        pairs=pairs,
        together=together,
        tile=batch,
    )(
        -(-rows // a_piece),
        weight.data_ptr(),
        prepared.data_ptr(),
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        table.address,
        *scales.addresses,
        max(0, blocksize.bit_length() - 8),
        rows,
        groups,
        batch,
        a_piece,
        AHEAD or columns // 2 * together,
    )


def _takes_tiles(activations: Tensor) -> bool:
    """Whether the matrix unit is the fastest for these activations."""
    return host.level().matrix and activations.dtype == torch.bfloat16 and activations.shape[0] >= TILED_BATCH


def _tiled(
    activations: Tensor,
    weight: Tensor,
    rows: int,
    scales: Scales,
    blocksize: int,
    table: tables.Table,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    batch, columns = activations.shape
    chunks, tall = columns // CHUNK, tiles.SIDE
    if activations.stride(1) != 1:
        activations = activations.contiguous()
    plan = _plan(batch, rows, chunks)
    prepared = torch.empty(plan.groups * plan.wide * tall * columns, dtype=torch.bfloat16)
    a_piece = -(-chunks // max(1, 2 * threads.count() // (plan.groups * plan.wide)))
    per_tile = -(-chunks // a_piece)
    kernel("prepare_tiles")(
        plan.groups * plan.wide * per_tile,
        activations.data_ptr(),
        prepared.data_ptr(),
        activations.stride(0) * activations.element_size(),
        chunks,
        batch,
        a_piece,
        per_tile,
    )
    stride = tiles.workspace_bytes(plan.wide, plan.groups, plan.panel, plan.tiles)
    workspace = _workspaces.get(64 + 64 + threads.count() * stride, torch.uint8)
    address = -(-workspace.data_ptr() // 64) * 64
    ctypes.c_int64.from_address(address).value = 0
    kernel(
        "product_tiles",
        nested=scales.nested,
        halves=blocksize < CHUNK,
        high=HIGH,
        wide=plan.wide,
        whole=plan.groups == 1,
        unroll=UNROLL,
    )(
        -(-rows // plan.rows_a_piece),
        weight.data_ptr(),
        prepared.data_ptr(),
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        table.address,
        *scales.addresses,
        max(0, blocksize.bit_length() - CHUNK.bit_length()),
        rows,
        chunks,
        batch,
        plan.groups,
        plan.panel,
        plan.rows_a_piece,
        address,
        stride,
        plan.panel * CHUNK // 2,
    )


@dataclass(frozen=True)
class _Plan:
    """How a product is cut for the matrix unit; see ``kernels/tiles.py``."""

    wide: int
    groups: int
    panel: int
    rows_a_piece: int
    tiles: int


@functools.lru_cache(maxsize=256)
def _plan(batch: int, rows: int, chunks: int) -> _Plan:
    wide = min(WIDE, -(-batch // tiles.SIDE))
    groups = -(-batch // (wide * tiles.SIDE))
    step = HIGH * tiles.SIDE
    if groups == 1:
        share = -(-rows // (step * 8 * threads.count())) * step
        return _Plan(wide, groups, min(PANEL, chunks), share, HIGH)
    share = min(GROUP_ROWS, -(-rows // (step * 2 * threads.count())) * step)
    return _Plan(wide, groups, min(PANEL_MANY, chunks), share, share // tiles.SIDE)


def tiles_in_use() -> tuple[int, ...]:
    """Tiles that batches of any size come to on this machine's level."""
    return (1, 2, 4, 8) if host.level().lanes == 16 else (1, 2, 4)


def _tile(batch: int) -> int:
    """Activations to multiply with a chunk at a time: as many as registers hold, without much left over."""
    if batch <= 2:
        return batch
    return min(tiles_in_use()[2:], key=lambda tile: (-(-batch // tile) * tile, -tile))


class _Workspaces(threading.local):
    """One dequantized slice for each dtype and Python thread, kept from call to call."""

    def __init__(self) -> None:
        self.held: dict[torch.dtype, Tensor] = {}

    def get(self, numel: int, dtype: torch.dtype) -> Tensor:
        found = self.held.get(dtype)
        if found is None or found.numel() < numel:
            with torch.inference_mode(False):
                found = self.held[dtype] = memory.empty((numel,), dtype)
        return found[:numel]


_workspaces = _Workspaces()


def _sliced(
    activations: Tensor,
    weight: Tensor,
    rows: int,
    scales: Scales,
    blocksize: int,
    table: tables.Table,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    columns = activations.shape[1]
    dtype = compute_dtype(out.dtype)
    activations, bias = activations.to(dtype), None if bias is None else bias.to(dtype)
    step = _slice_of(rows, columns * dtype.itemsize)
    with torch.no_grad():
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            piece = _workspaces.get((stop - start) * columns, dtype)
            decode(weight, scales, blocksize, table, piece, first=start * columns, end=stop * columns, exact=False)
            part = None if bias is None else bias[start:stop]
            out[:, start:stop] = torch.nn.functional.linear(activations, piece.view(-1, columns), part)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What slices are multiplied in: bf16 where the CPU has products of bf16; elsewhere fp32 is faster."""
    return dtype if dtype == torch.bfloat16 and host.multiplies_bf16() else torch.float32


def _fused_batch(dtype: torch.dtype) -> int:
    return FUSED_BATCH.get((host.level().name, compute_dtype(dtype)), 16)


def _slice_of(count: int, size: int) -> int:
    """Rows or columns of ``size`` bytes to take at a time: equal slices of at most SLICE_BYTES, a multiple of 64."""
    most = max(1, SLICE_BYTES // size)
    even = -(-count // -(-count // most))
    return min(count, -(-even // 64) * 64)


@implements("cpu", "gemm_4bit_dgrad")
def gemm_4bit_dgrad(
    grad: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """``grad @ weight``: the gradient that :func:`gemm_4bit` passes to its activation, by slices of columns."""
    rows, columns = shapeB
    out = memory.empty((*grad.shape[:-1], columns), grad.dtype)
    if not out.numel() or not rows:
        return out.zero_()
    scales = Scales(absmax, absmax_8bit, absmax_code, absmax_offset)
    weight, table = B.detach().contiguous(), tables.lookup_of(quant_type)
    flat, result = grad.detach().reshape(-1, rows), out.view(-1, columns)
    dtype = compute_dtype(out.dtype)
    flat, step = flat.to(dtype), _slice_of(columns, rows * dtype.itemsize)
    with torch.no_grad():
        for start in range(0, columns, step):
            width = min(columns, start + step) - start
            piece = _workspaces.get(rows * width, dtype)
            end = math.prod(shapeB)
            decode(weight, scales, blocksize, table, piece, first=start, end=end, segment=(width, columns), exact=False)
            result[:, start : start + width] = torch.matmul(flat, piece.view(rows, width))
    return out
