"""Launcher of 4-bit quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.backends.registry import implements
from halfbyte.backends.triton.device import cell_table_of
from halfbyte.backends.triton.kernels.quantize import _quantize_4bit_kernel
from halfbyte.backends.triton.launch import on_device, start
from halfbyte.formats import blocks
from halfbyte.formats.codebook import codebook

__all__ = ["quantize_4bit"]

SPAN = 2048
"""Values of one program, where blocks are no longer than that."""


@implements("triton", "quantize_4bit")
def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed codes ``(bytes / itemsize, 1)`` and fp32 absmax ``(blocks,)`` of ``A`` in row-major order."""
    values = A.contiguous()
    numel = values.numel()
    packed = torch.empty(blocks.packed_bytes(numel), dtype=torch.uint8, device=A.device)
    absmax = torch.empty(blocks.block_count(numel, blocksize), dtype=torch.float32, device=A.device)
    if numel:
        book = codebook(quant_type)
        cells, per_unit = cell_table_of(quant_type, A.device.index)
        with on_device(A.device.index):
            rows = max(1, SPAN // blocksize)
            start(
                _quantize_4bit_kernel,
                (-(-numel // (rows * blocksize)),),
                values,
                packed,
                absmax,
                cells,
                numel,
                blocksize,
                rows,
                per_unit,
                book.sign_bit is not None,
                book.zero_code,
                numel % (rows * blocksize) != 0,
                num_warps=4 if blocksize <= SPAN else 8,
                enable_fp_fusion=False,
            )
    return packed.view(quant_storage).view(-1, 1), absmax
