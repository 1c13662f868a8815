"""4-bit quantization of tensors, and products with them."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import backends as _backends  # defines and binds the ops
from halfbyte.errors import ArgumentError, QuantStateMissingError
from halfbyte.formats import blocks
from halfbyte.functional.blockwise import flat_absmax, quantize_blockwise
from halfbyte.functional.maps import get_4bit_type
from halfbyte.functional.results import into
from halfbyte.quant_state import QuantState

__all__ = [
    "dequantize_4bit",
    "dequantize_fp4",
    "dequantize_nf4",
    "format_of",
    "gemv_4bit",
    "kernel_scales",
    "quantize_4bit",
    "quantize_fp4",
    "quantize_nf4",
]

_ops = torch.ops.halfbyte
del _backends


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
    packed, scales = _ops.quantize_4bit(A.detach(), blocksize, quant_type, quant_storage)
    packed, scales = into(out, packed), into(absmax, scales)
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


def kernel_scales(state: QuantState) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(absmax, absmax_8bit, absmax_code, absmax_offset)`` as the 4-bit ops take them."""
    state2 = state.state2
    if state2 is None or not state.nested:
        return state.absmax, None, None, None
    if state2.blocksize != blocks.NESTED_BLOCKSIZE or state2.code is None or state.offset is None or state2.nested:
        return flat_absmax(state), None, None, None
    return state2.absmax, state.absmax, state2.code, state.offset
