"""Products with a packed 4-bit weight on the CPU, and the gradient: which way is taken for how many activations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halfbyte.backends.cpu import fused, host, memory, sliced, tables, threads, tiled
from halfbyte.backends.cpu.call import Product
from halfbyte.backends.cpu.kernels.level import CHUNK, Level
from halfbyte.backends.cpu.scales import Scales
from halfbyte.backends.cpu.weight import Sizes, Weight
from halfbyte.backends.registry import implements

__all__ = ["gemm_4bit", "gemm_4bit_dgrad", "gemv_4bit"]

FUSED_BATCH = {
    ("amx", torch.float32): 48,
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


def _prepare(
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
) -> Callable[[Tensor], Tensor] | None:
    """The product with contiguous activations of A's shape and dtype, while the other tensors stay in place."""
    rows, columns = shapeB
    given = [tensor for tensor in (B, absmax, bias, absmax_8bit, absmax_code, absmax_offset) if tensor is not None]
    offset_fits = absmax_offset is None or absmax_offset.dtype == torch.float32
    if not A.numel() or not rows or not offset_fits or not all(tensor.is_contiguous() for tensor in given):
        return None
    scales = Scales(absmax, absmax_8bit, absmax_code, absmax_offset)
    weight = Weight(B, shapeB, scales, blocksize, tables.lookup_of(quant_type), bias)
    multiply = _fused(A.numel() // columns, A.dtype, weight.sizes)
    if multiply is None:
        return None
    packed, inputs, stride = weight.packed_address, weight.inputs, columns * A.element_size()
    made = memory.maker((*A.shape[:-1], rows), A.dtype)

    def repeat(x: Tensor) -> Tensor:
        out = made()
        multiply(x.data_ptr(), stride, out.data_ptr(), packed, inputs)
        return out

    return repeat


@implements("cpu", "gemm_4bit", prepare=_prepare)
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
    _product(A, Weight(B, shapeB, scales, blocksize, tables.lookup_of(quant_type), bias), out)
    return out


@implements("cpu", "gemv_4bit")
def gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """``A @ weight.T`` with the 16 levels given as a tensor."""
    out = memory.empty((*A.shape[:-1], shapeB[0]), A.dtype)
    table = tables.lookup(code.detach().contiguous().numpy().tobytes())
    _product(A, Weight(B, shapeB, Scales(absmax), blocksize, table), out)
    return out


@implements("cpu", "gemv_4bit.out")
def gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, *, out: Tensor
) -> None:
    """:func:`gemv_4bit` into ``out``."""
    out.copy_(gemv_4bit(A, B, shapeB, absmax, code, blocksize))


def _product(A: Tensor, weight: Weight, out: Tensor) -> None:
    columns = weight.columns
    if not out.numel():
        return
    if not columns:
        out.zero_() if weight.bias is None else out.copy_(weight.bias.detach().expand_as(out))
        return
    activations, stride = A, columns
    multiply = _fused(A.numel() // columns, A.dtype, weight.sizes)
    if multiply is None or not A.is_contiguous():
        activations = A.detach().reshape(-1, columns)
        if activations.stride(1) != 1:
            activations = activations.contiguous()
        stride = activations.stride(0)
    if multiply is None:
        sliced.multiply(activations, weight, out.view(-1, weight.rows))
        return
    source, inputs = activations.data_ptr(), weight.inputs
    multiply(source, stride * activations.element_size(), out.data_ptr(), weight.packed_address, inputs)


def _fused(batch: int, dtype: torch.dtype, weight: Sizes) -> Product | None:
    """One of the products that decode the weight as they go; None where slices are faster."""
    return _planned(host.level(), threads.count(), batch, dtype, weight)


@functools.lru_cache(maxsize=1024)
def _planned(level: Level, count: int, batch: int, dtype: torch.dtype, weight: Sizes) -> Product | None:
    del level, count  # what plans are kept by: those that make them ask for themselves
    if weight.columns % CHUNK:
        return None
    if fused.takes_rows(batch, weight.columns):
        return fused.by_rows(batch, dtype, weight)
    if tiled.takes(batch, dtype):
        return tiled.by_tiles(batch, weight)
    return fused.by_chunks(batch, dtype, weight) if batch <= _fused_batch(dtype) else None


def _fused_batch(dtype: torch.dtype) -> int:
    return FUSED_BATCH.get((host.level().name, sliced.compute_dtype(dtype)), 16)


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
    weight = Weight(B, shapeB, scales, blocksize, tables.lookup_of(quant_type))
    sliced.gradient(grad.detach().reshape(-1, rows), weight, out.view(-1, columns))
    return out
