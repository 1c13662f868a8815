"""8-bit blockwise quantization of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import backends as _backends  # defines and binds the ops
from halfbyte.errors import ArgumentError
from halfbyte.formats import blocks
from halfbyte.functional.maps import create_dynamic_map, name2qmap
from halfbyte.functional.results import into
from halfbyte.quant_state import QuantState

__all__ = ["dequantize_blockwise", "flat_absmax", "quantize_blockwise"]

_ops = torch.ops.halfbyte
del _backends


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
    values = A.detach()  # codes have no gradient, and scales must not keep its graph
    # Copied: tensors that two states share could be neither saved together nor changed apart.
    code = code.to(values.device, copy=True)
    if out is not None and absmax is not None and not nested:
        _ops.quantize_blockwise.out(values, code, blocksize, out=out, absmax=absmax)
        codes, scales = out, absmax
    else:
        codes, scales = _ops.quantize_blockwise(values, code, blocksize)
        codes, scales = into(out, codes), into(absmax, scales)
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


def flat_absmax(state: QuantState) -> Tensor:
    """fp32 absmax of every block, double quantization undone."""
    if state.state2 is None or not state.nested:
        return state.absmax.float()
    scales = dequantize_blockwise(state.absmax, state.state2)
    return scales if state.offset is None else scales + state.offset.float()
