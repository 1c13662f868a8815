"""Checks that several ops share: dtypes, codebooks, packed bytes, absmax plain and nested."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError
from halfbyte.formats import blocks
from halfbyte.formats.codebook import codebook, codebook_names

__all__ = [
    "FLOAT_DTYPES",
    "STORAGE_DTYPES",
    "check_absmax",
    "check_code",
    "check_float",
    "check_float_dtype",
    "check_format_4bit",
    "check_out",
    "check_packed",
    "check_storage_dtype",
]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORAGE_DTYPES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_float(tensor: Tensor, what: str) -> None:
    """Refuse ``tensor`` unless it is fp32, bf16 or fp16."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"{what} is {tensor.dtype}", expected="float32, bfloat16 or float16", hint="use .float()")


def check_float_dtype(dtype: torch.dtype) -> None:
    """Refuse an output dtype other than fp32, bf16 or fp16."""
    if dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"output dtype is {dtype}", expected="float32, bfloat16 or float16")


def check_storage_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype under which packed bytes do not appear."""
    if dtype not in STORAGE_DTYPES:
        names = [str(known).removeprefix("torch.") for known in STORAGE_DTYPES]
        raise ArgumentError(f"quant_storage is {dtype}", expected=f"{', '.join(names[:-1])} or {names[-1]}")


def check_format_4bit(quant_type: str, blocksize: int) -> None:
    """Refuse a name that is no 4-bit codebook, or a blocksize that 4-bit formats do not have."""
    if codebook(quant_type).bits != 4:
        raise ArgumentError(f"quant_type {quant_type!r} is no 4-bit type", expected=", ".join(codebook_names(4)))
    blocks.check_blocksize_4bit(blocksize)


def check_code(code: Tensor, entries: int) -> None:
    """Refuse a code map that is not fp32 with ``entries`` values."""
    if code.dtype != torch.float32 or code.numel() != entries:
        raise ArgumentError(f"code is {code.dtype} with {code.numel()} values", expected=f"float32 with {entries}")


def check_packed(packed: Tensor, numel: int) -> None:
    """Refuse a packed tensor that does not hold exactly the bytes of ``numel`` 4-bit codes."""
    have, need = packed.numel() * packed.element_size(), blocks.packed_bytes(numel)
    if have != need:
        raise ArgumentError(
            f"packed weight holds {have} bytes",
            expected=f"{need} for {numel} values",
            hint="this quant_state belongs to another tensor",
        )


def check_absmax(
    absmax: Tensor,
    numel: int,
    blocksize: int,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> None:
    """Refuse scales whose dtype or number does not fit ``numel`` values in blocks of ``blocksize``."""
    count = blocks.block_count(numel, blocksize)
    if absmax.dtype != torch.float32:
        raise ArgumentError(f"absmax is {absmax.dtype}", expected="float32", hint="pass quant_state.absmax unconverted")
    if absmax_8bit is None:
        if absmax.numel() != count:
            raise ArgumentError(
                f"absmax has {absmax.numel()} values", expected=f"{count}: one per block of {blocksize} of {numel}"
            )
        return
    if absmax_code is None or absmax_offset is None:
        raise ArgumentError("absmax_8bit without absmax_code or absmax_offset", expected="all three or none")
    if absmax_8bit.dtype != torch.uint8 or absmax_8bit.numel() != count:
        raise ArgumentError(
            f"absmax_8bit is {absmax_8bit.dtype} with {absmax_8bit.numel()} values", expected=f"uint8 with {count}"
        )
    check_code(absmax_code, 256)
    if absmax_offset.numel() != 1:
        raise ArgumentError(f"absmax_offset has {absmax_offset.numel()} values", expected="one")
    second = blocks.block_count(count, blocks.NESTED_BLOCKSIZE)
    if absmax.numel() != second:
        raise ArgumentError(f"second-level absmax has {absmax.numel()} values", expected=f"{second}")


def check_out(out: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse an ``out`` whose dtype, shape or device is not that of the result."""
    if out.dtype != dtype or tuple(out.shape) != shape or out.device != device:
        raise ArgumentError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}", expected=f"{dtype} {shape} on {device}"
        )
