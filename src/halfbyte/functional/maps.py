"""Code maps as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError
from halfbyte.formats import blocks, dynamic, fp8, linear, normal
from halfbyte.formats.codebook import codebook
from halfbyte.ops.arguments import check_format_4bit

__all__ = [
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "get_4bit_type",
    "name2qmap",
]

name2qmap: dict[str, Tensor] = {}
"""Cache of code maps by name; ``"dynamic"`` is the default of ``quantize_blockwise``."""


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The dynamic 8-bit map, fp32 ``(256,)``, rising. See :func:`halfbyte.formats.dynamic.dynamic_map`."""
    return torch.from_numpy(dynamic.dynamic_map(signed, max_exponent_bits, total_bits))


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """The linear map, fp32 ``(256,)``, rising. See :func:`halfbyte.formats.linear.linear_map`."""
    return torch.from_numpy(linear.linear_map(signed, total_bits, add_zero))


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """An FP8-like map, fp32 ``(256,)``, rising. See :func:`halfbyte.formats.fp8.fp8_map`."""
    return torch.from_numpy(fp8.fp8_map(signed, exponent_bits, precision_bits, total_bits))


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution, fp32 ``(256,)``, rising. See :func:`halfbyte.formats.normal.normal_map`."""
    return torch.from_numpy(normal.normal_map(offset, use_extra_value))


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The 16 fp32 levels of a 4-bit type, in code order.

    Args:
        typename: ``"nf4"``, ``"fp4"``, ``"int4"`` or ``"af4"``.
        device: Where the tensor goes; None is CUDA where there is one, else the CPU.
        blocksize: ``"af4"`` is defined for 64 only.

    Raises:
        ArgumentError: Unknown type, or AF4 with another blocksize.

    >>> get_4bit_type("nf4", device="cpu")[[0, 7, 15]].tolist()
    [-1.0, 0.0, 1.0]
    """
    check_format_4bit(typename, blocks.DEFAULT_BLOCKSIZE_4BIT)
    if typename == "af4" and blocksize != 64:
        raise ArgumentError(f"af4 with blocksize {blocksize}", expected="64, for which its levels were derived")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.tensor(codebook(typename).levels, dtype=torch.float32, device=device)
