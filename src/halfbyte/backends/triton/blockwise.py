"""Launchers of the 8-bit blockwise ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.backends.registry import implements
from halfbyte.backends.triton.device import dynamic_maps_of
from halfbyte.backends.triton.kernels.dequantize import _dequantize_blockwise_kernel
from halfbyte.backends.triton.kernels.quantize import _cells_8bit_kernel, _quantize_blockwise_kernel
from halfbyte.backends.triton.launch import dense, on_device, start
from halfbyte.formats import blocks

__all__ = ["dequantize_blockwise", "quantize_blockwise"]

CELLS = 4096
PROGRAMS = 64
SPAN = 2048
"""Values of one program, where blocks are no longer than that."""
LONGEST = 16384
"""Values of the longest block that one program takes."""


def _long_blocks(A: Tensor, code: Tensor, blocksize: int, **_named: Any) -> str | None:
    del code
    if min(blocksize, A.numel()) > LONGEST:
        return f"blocks of more than {LONGEST} values do not fit one program"
    return None


def _quantize(values: Tensor, code: Tensor, blocksize: int, codes: Tensor, absmax: Tensor) -> None:
    numel = values.numel()
    if not numel:
        return
    # A block longer than the tensor is a block of the tensor's length.
    blocksize = min(blocksize, numel)
    width = 1 << (blocksize - 1).bit_length()
    rows = max(1, SPAN // width)
    code = dense(code)
    with on_device(values.device.index):
        cells = torch.empty(CELLS, dtype=torch.int64, device=values.device)
        widest = torch.empty(PROGRAMS, dtype=torch.int32, device=values.device)
        cuts = torch.empty(256, dtype=torch.float32, device=values.device)
        kind = torch.empty(1, dtype=torch.int32, device=values.device)
        signed, unsigned = dynamic_maps_of(values.device.index)
        start(
            _cells_8bit_kernel, (PROGRAMS,), code, signed, unsigned, cells, widest, cuts, kind, CELLS // PROGRAMS,
            num_warps=4,
        )  # fmt: skip
        start(
            _quantize_blockwise_kernel,
            (-(-numel // (rows * blocksize)),),
            values,
            codes,
            absmax,
            code,
            cells,
            widest,
            cuts,
            kind,
            blocksize,
            numel,
            width,
            rows,
            PROGRAMS,
            width != blocksize or numel % (rows * width) != 0,
            torch.version.hip is None,
            num_warps=4 if rows * width <= 4096 else 8,
            enable_fp_fusion=False,
        )


@implements("triton", "quantize_blockwise", declines=_long_blocks)
def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """uint8 index of the nearest value of ``code`` (ties go down), of A's shape, and fp32 absmax ``(blocks,)``."""
    codes = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
    absmax = torch.empty(blocks.block_count(A.numel(), blocksize), dtype=torch.float32, device=A.device)
    _quantize(A.contiguous(), code, blocksize, codes, absmax)
    return codes, absmax


@implements("triton", "quantize_blockwise.out", declines=_long_blocks)
def quantize_blockwise_out(A: Tensor, code: Tensor, blocksize: int, *, out: Tensor, absmax: Tensor) -> None:
    """:func:`quantize_blockwise` into ``out`` and ``absmax``."""
    if out.is_contiguous() and absmax.is_contiguous():
        _quantize(A.contiguous(), code, blocksize, out, absmax)
    else:
        codes, scales = quantize_blockwise(A, code, blocksize)
        out.copy_(codes)
        absmax.copy_(scales)


def _dequantize(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, out: Tensor) -> None:
    numel = codes.numel()
    if not numel:
        return
    width = 8
    while blocksize % width:
        width //= 2
    lanes, tiles = 128, 4
    with on_device(codes.device.index):
        start(
            _dequantize_blockwise_kernel,
            (-(-numel // (lanes * width * tiles)),),
            codes,
            dense(absmax),
            dense(code),
            out,
            blocksize,
            numel,
            lanes,
            width,
            tiles,
            num_warps=4,
        )


@implements("triton", "dequantize_blockwise")
def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """``code[A] * absmax`` in fp32, rounded once to ``dtype``, of A's shape."""
    out = torch.empty(A.shape, dtype=dtype, device=A.device)
    _dequantize(A.contiguous(), absmax, code, blocksize, out)
    return out


@implements("triton", "dequantize_blockwise.out")
def dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, *, out: Tensor
) -> None:
    """:func:`dequantize_blockwise` into ``out``."""
    del dtype
    if out.is_contiguous():
        _dequantize(A.contiguous(), absmax, code, blocksize, out)
    else:
        out.copy_(dequantize_blockwise(A, absmax, code, blocksize, out.dtype))
