"""bitsandbytes.functional's names: quantize, dequantize and multiply tensors, without modules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbyte import backends as _backends  # defines and binds the ops
from halfbyte.errors import ArgumentError, QuantStateMissingError
from halfbyte.formats import blocks, dynamic, fp8, linear, normal
from halfbyte.formats.codebook import codebook
from halfbyte.ops.arguments import check_format_4bit, check_out
from halfbyte.quant_state import QuantState, pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = [
    "C",
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "kernel_scales",
    "name2qmap",
    "pack_dict_to_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]

C = 127.0
"""Largest int8 code."""

name2qmap: dict[str, Tensor] = {}
"""Cache of code maps by name; ``"dynamic"`` is the default of :func:`quantize_blockwise`."""

_ops = torch.ops.halfbyte
del _backends


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
    return torch.tensor(codebook(typename).table, device=device)


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = blocks.DEFAULT_BLOCKSIZE_8BIT,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize to 8-bit codes of a rising 256-entry map, in blocks with their own absmax.

    Args:
        A: fp32, bf16 or fp16, any shape.
        code: The map; None is the signed dynamic map.
        absmax: Filled with the scales where given, fp32 ``(blocks,)``.
        out: Filled with the codes where given, uint8 of A's shape.
        blocksize: Values per block.
        nested: Quantize absmax as well, in blocks of the same size.

    Returns:
        uint8 codes of A's shape and their QuantState.
    """
    if code is None:
        if "dynamic" not in name2qmap:
            name2qmap["dynamic"] = create_dynamic_map()
        code = name2qmap["dynamic"]
    code = code.to(A.device)
    if out is not None and absmax is not None and not nested:
        _ops.quantize_blockwise.out(A, code, blocksize, out=out, absmax=absmax)
        codes, scales = out, absmax
    else:
        codes, scales = _ops.quantize_blockwise(A, code, blocksize)
        codes, scales = _into(out, codes), _into(absmax, scales)
    if not nested:
        return codes, QuantState(scales, None, code, blocksize, None, A.dtype)
    offset = scales.mean()
    codes2, state2 = quantize_blockwise(scales - offset, blocksize=blocksize)
    return codes, QuantState(codes2, None, code, blocksize, None, A.dtype, offset, state2)


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = blocks.DEFAULT_BLOCKSIZE_8BIT,
    nested: bool = False,
) -> Tensor:
    """Values of 8-bit codes, in the original dtype (fp32 where only ``absmax`` is given).

    Raises:
        ArgumentError: Neither ``quant_state`` nor ``absmax``.
    """
    del nested
    if quant_state is None:
        if absmax is None:
            raise ArgumentError("neither quant_state nor absmax", expected="one of them")
        if code is None:
            code = create_dynamic_map()
        quant_state = QuantState(absmax, None, code, blocksize, None, torch.float32)
    scales = flat_absmax(quant_state)
    if quant_state.code is None or quant_state.blocksize is None:
        raise ArgumentError("the quant_state lacks code or blocksize", expected="both")
    table, dtype = quant_state.code.to(A.device), quant_state.dtype or torch.float32
    if out is not None:
        _ops.dequantize_blockwise.out(A, scales, table, quant_state.blocksize, dtype, out=out)
        return out
    return _ops.dequantize_blockwise(A, scales, table, quant_state.blocksize, dtype)


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantize to packed 4-bit codes, in blocks of consecutive values with their own absmax.

    Args:
        A: fp32, bf16 or fp16, any shape; read in row-major order.
        absmax: Filled with the fp32 scales ``(blocks,)`` where given.
        out: Filled with the packed codes where given.
        blocksize: 32 to 4096, a power of two; None is 64.
        compress_statistics: Double quantization: absmax minus its mean becomes 8-bit, in blocks of 256.
        quant_type: ``"nf4"`` or ``"fp4"``.
        quant_storage: dtype under which the packed bytes appear.

    Returns:
        ``(ceil(n / 2) / itemsize, 1)`` of ``quant_storage``, first value in the high nibble, and its QuantState.

    Raises:
        ArgumentError: A dtype, blocksize, type or storage that there is not, or bytes that do not fill the storage.

    >>> packed, state = quantize_4bit(torch.tensor([1.0, -1.0, 0.0, 0.5]), quant_type="nf4")
    >>> [hex(b) for b in packed.flatten().tolist()], state.absmax.tolist()
    (['0xf0', '0x7c'], [1.0])
    """
    blocksize = blocks.DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
    packed, scales = _ops.quantize_4bit(A, blocksize, quant_type, quant_storage)
    packed, scales = _into(out, packed), _into(absmax, scales)
    code = get_4bit_type(quant_type, A.device)
    if not compress_statistics:
        return packed, QuantState(scales, A.shape, code, blocksize, quant_type, A.dtype)
    offset = scales.mean() if scales.numel() else scales.new_zeros(())
    codes, state2 = quantize_blockwise(scales - offset, blocksize=blocks.NESTED_BLOCKSIZE)
    return packed, QuantState(codes, A.shape, code, blocksize, quant_type, A.dtype, offset, state2)


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` with FP4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` with NF4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Values of packed 4-bit codes, in the original shape and dtype.

    Args:
        A: Packed codes; where its first dimension is 1 (``weight.t()``), the result is transposed.
        quant_state: From :func:`quantize_4bit`. Without it, ``absmax`` and ``out`` are needed.
        absmax: Scales, where there is no quant_state.
        out: Filled with the values where given.
        blocksize: Where there is no quant_state; None is 64.
        quant_type: Where there is no quant_state.

    Raises:
        ArgumentError: Too little is given, or sizes do not fit each other.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ArgumentError("no quant_state", expected="quant_state, or absmax and out")
        size = blocks.DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
        quant_state = QuantState(absmax, out.shape, None, size, quant_type, out.dtype)
    shape, size, kind, dtype = format_of(quant_state)
    scales = kernel_scales(quant_state)
    arguments = (A, scales[0], size, kind, shape, dtype, *scales[1:])
    if out is not None:
        _ops.dequantize_4bit.out(*arguments, out=out)
    values: Tensor = _ops.dequantize_4bit(*arguments) if out is None else out
    return values.t() if A.shape[0] == 1 and values.dim() == 2 else values


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` with FP4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` with NF4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """``A @ dequantized(B).T`` with the levels of ``state.code``.

    Raises:
        QuantStateMissingError: No ``state``.
    """
    del transposed_A, transposed_B
    if state is None:
        raise QuantStateMissingError("gemv_4bit without a state", hint="pass state=quant_state of quantize_4bit")
    shape, blocksize, kind, _ = format_of(state)
    code = get_4bit_type(kind, A.device) if state.code is None else state.code
    arguments = (A, B, shape, flat_absmax(state), code, blocksize)
    if out is not None:
        _ops.gemv_4bit.out(*arguments, out=out)
        return out
    return _ops.gemv_4bit(*arguments)


def format_of(state: QuantState) -> tuple[list[int], int, str, torch.dtype]:
    """Shape, blocksize, quant_type and dtype of a 4-bit state.

    Raises:
        QuantStateMissingError: One of them is None.
    """
    if state.shape is None or state.blocksize is None or state.quant_type is None or state.dtype is None:
        raise QuantStateMissingError(
            f"incomplete quant_state {state!r}", expected="shape, blocksize, quant_type and dtype"
        )
    return list(state.shape), state.blocksize, state.quant_type, state.dtype


def flat_absmax(state: QuantState) -> Tensor:
    """fp32 absmax of every block, double quantization undone."""
    if state.state2 is None or not state.nested:
        return state.absmax.float()
    scales = dequantize_blockwise(state.absmax, state.state2)
    return scales if state.offset is None else scales + state.offset.float()


def kernel_scales(state: QuantState) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(absmax, absmax_8bit, absmax_code, absmax_offset)`` as the 4-bit ops take them."""
    state2 = state.state2
    if state2 is None or not state.nested:
        return state.absmax, None, None, None
    if state2.blocksize != blocks.NESTED_BLOCKSIZE or state2.code is None or state.offset is None or state2.nested:
        return flat_absmax(state), None, None, None
    return state2.absmax, state.absmax, state2.code, state.offset


def _into(given: Tensor | None, made: Tensor) -> Tensor:
    """``made``, or ``given`` filled with it."""
    if given is None:
        return made
    if math.prod(given.shape) != made.numel():
        check_out(given, made.dtype, tuple(made.shape), made.device)
    return given.copy_(made.view(given.shape))
