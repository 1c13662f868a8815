"""LLM.int8() on the CPU: activations to codes and outliers in one pass, products in one more, exact integer sums."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from halfbyte.backends.cpu import threads
from halfbyte.backends.cpu.call import DTYPES, kernel
from halfbyte.backends.cpu.kernels.int8 import NO_THRESHOLD
from halfbyte.backends.cpu.sliced import compute_dtype
from halfbyte.backends.registry import implements
from halfbyte.formats import int8

__all__ = ["int8_linear", "int8_linear_dgrad", "int8_linear_matmul", "int8_scaled_mm", "int8_vectorwise_quant"]

SLICE_VALUES = 1 << 20
"""Weight values that a gradient dequantizes at a time."""

PIECE_BYTES = 128 << 10
"""Weight of one piece of work when there are many activations: stays in the cache while they pass."""


class Rows:
    """Activations as the product takes them: 16-bit codes of whole tiles, and scale and outliers of each row."""

    __slots__ = ("absmax", "codes", "counts", "outliers", "source", "tile", "tiles")

    def __init__(self, batch: int, columns: int) -> None:
        self.tile = 1 if batch == 1 else 2 if batch == 2 else 4
        self.tiles = -(-batch // self.tile)
        self.codes = torch.empty((self.tiles * self.tile, columns), dtype=torch.int16)
        self.codes[batch:] = 0
        self.absmax: Tensor | None = None
        self.outliers: Tensor | None = None
        self.counts: Tensor | None = None
        self.source: Tensor | None = None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _quantize(source: Tensor, threshold: float, codes: Tensor, rows: Rows | None = None) -> Tensor:
    """Fill ``codes`` from the rows of ``source``, and the lists of outliers in ``rows``. Returns absmax."""
    count, columns = source.shape
    absmax = torch.empty(count, dtype=torch.float32)
    if rows is not None:
        rows.absmax, rows.source = absmax, source
        if threshold:
            rows.outliers = torch.empty((count, columns), dtype=torch.int32)
            rows.counts = torch.empty(count, dtype=torch.int32)
    bits = struct.unpack("<I", struct.pack("<f", threshold))[0] if threshold else NO_THRESHOLD
    width = "i16" if codes.dtype == torch.int16 else "i8"
    kernel("quantize_int8", dtype=DTYPES[source.dtype], width=width, split=bool(threshold))(
        count,
        source.data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        _address(rows.outliers if rows else None),
        _address(rows.counts if rows else None),
        source.stride(0) * source.element_size(),
        columns,
        bits,
    )
    return absmax


def _product(rows: Rows, CB: Tensor, SCB: Tensor | None, bias: Tensor | None, full: Tensor | None, out: Tensor) -> None:
    """Fill contiguous ``out``, ``(batch, N)``."""
    weight = CB.detach().contiguous()
    count, columns = weight.shape
    bias = None if bias is None else bias.detach().float().contiguous()
    scales = None if SCB is None else SCB.detach().contiguous()
    full = None if full is None or rows.counts is None else full.detach().contiguous()
    if rows.tiles == 1:
        pieces = min(-(-count // 16), 8 * threads.count())
    else:
        pieces = max(threads.count(), -(-count * columns // PIECE_BYTES))
    a_piece = -(-count // min(pieces, count))
    kernel(
        "product_int8",
        dtype="i32" if out.dtype == torch.int32 else DTYPES[out.dtype],
        tile=rows.tile,
        split=rows.counts is not None,
        full="" if full is None else DTYPES[full.dtype],
    )(
        -(-count // a_piece),
        weight.data_ptr(),
        rows.codes.data_ptr(),
        out.data_ptr(),
        _address(bias),
        _address(rows.absmax),
        _address(scales),
        _address(rows.outliers),
        _address(rows.counts),
        _address(rows.source),
        _address(full),
        0 if rows.source is None else rows.source.stride(0) * rows.source.element_size(),
        columns,
        count,
        out.shape[0],
        rows.tiles,
        a_piece,
    )


def _matrix(A: Tensor) -> Tensor:
    """``A`` as a matrix whose rows are contiguous."""
    rows = A.detach().reshape(A.shape[:-1].numel(), A.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _empty(*tensors: Tensor) -> str | None:
    return "an empty tensor" if any(tensor.numel() == 0 for tensor in tensors) else None


def _unfit(A: Tensor, B: Tensor) -> str | None:
    if A.shape[-1] > int8.EXACT_INT32_TERMS:
        return f"rows of more than {int8.EXACT_INT32_TERMS} codes, whose sums int32 cannot hold"
    return _empty(A, B)


def _declines_quant(A: Tensor, threshold: float = 0.0) -> str | None:
    return "outlier columns of a whole matrix" if threshold else _empty(A)


@implements("cpu", "int8_vectorwise_quant", declines=_declines_quant)
def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, None]:
    """Codes of A's shape and fp32 absmax ``(rows,)``."""
    codes = torch.empty(A.shape, dtype=torch.int8)
    return codes, _quantize(_matrix(A), threshold, codes), None


def _codes_of(A: Tensor) -> Rows:
    matrix = _matrix(A)
    rows = Rows(*matrix.shape)
    rows.codes[: matrix.shape[0]] = matrix
    return rows


@implements("cpu", "int8_linear_matmul", declines=_empty)
def int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    """``A @ B.T`` as exact int32."""
    out = torch.empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32)
    _product(_codes_of(A), B, None, None, None, out.view(-1, B.shape[0]))
    return out


@implements("cpu", "int8_linear_matmul.out", declines=lambda A, B, *, out: _empty(A, B))
def int8_linear_matmul_out(A: Tensor, B: Tensor, *, out: Tensor) -> None:
    """:func:`int8_linear_matmul` into ``out``."""
    out.copy_(int8_linear_matmul(A, B))


def _declines_scaled(A: Tensor, B: Tensor, *_rest: object, **_named: object) -> str | None:
    return _unfit(A, B)


@implements("cpu", "int8_scaled_mm", declines=_declines_scaled)
def int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Product of two quantized matrices, ``A @ B.T + bias``, in ``dtype`` (None: fp16)."""
    rows = _codes_of(A)
    rows.absmax = row_stats.detach().contiguous()
    out = torch.empty((*A.shape[:-1], B.shape[0]), dtype=dtype or torch.float16)
    _product(rows, B, col_stats, bias, None, out.view(-1, B.shape[0]))
    return out


def _declines_linear(
    A: Tensor,
    CB: Tensor,
    SCB: Tensor,
    threshold: float = 0.0,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
) -> str | None:
    if weight is not None and weight.dtype not in DTYPES:
        return f"an unquantized weight of {weight.dtype}"
    return _unfit(A, CB)


@implements("cpu", "int8_linear", declines=_declines_linear)
def int8_linear(
    A: Tensor,
    CB: Tensor,
    SCB: Tensor,
    threshold: float = 0.0,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """LLM.int8() of every row by itself, in one pass over the activations and one over the weight."""
    source = _matrix(A)
    rows = Rows(*source.shape)
    _quantize(source, threshold, rows.codes, rows)
    out = torch.empty((*A.shape[:-1], CB.shape[0]), dtype=A.dtype)
    _product(rows, CB, SCB, bias, weight, out.view(-1, CB.shape[0]))
    return out


@implements("cpu", "int8_linear_dgrad", declines=lambda grad, CB, SCB: _empty(grad, CB))
def int8_linear_dgrad(grad: Tensor, CB: Tensor, SCB: Tensor) -> Tensor:
    """``grad @ weight``, a slice of the weight's columns at a time: never more than a few MB of it dequantized."""
    count, columns = CB.shape
    # Where the CPU has no products of bf16, fp32 is many times faster, and rounds once.
    dtype = compute_dtype(grad.dtype)
    rows = grad.reshape(-1, count).to(dtype)
    out = torch.empty((rows.shape[0], columns), dtype=grad.dtype)
    scales = (SCB * int8.STEP).view(-1, 1)
    width = max(1, min(columns, SLICE_VALUES // count))
    for start in range(0, columns, width):
        weight = CB[:, start : start + width] * scales
        out[:, start : start + width] = torch.mm(rows, weight.to(dtype))
    return out.view(*grad.shape[:-1], columns)
