"""absmax of a weight as kernels take it."""

from __future__ import annotations

from torch import Tensor

from halfbyte.formats import blocks

__all__ = ["Scales", "decoded"]


class Scales:
    """Addresses of absmax, plain or double-quantized, and the tensors that must outlive the call."""

    __slots__ = ("addresses", "kept", "nested")

    def __init__(
        self,
        absmax: Tensor,
        absmax_8bit: Tensor | None = None,
        absmax_code: Tensor | None = None,
        absmax_offset: Tensor | None = None,
    ) -> None:
        self.nested = absmax_8bit is not None and absmax_code is not None and absmax_offset is not None
        if absmax_8bit is None or absmax_code is None or absmax_offset is None:
            absmax = absmax.contiguous()
            self.kept: tuple[Tensor, ...] = (absmax,)
            self.addresses = (absmax.data_ptr(), 0, 0, 0)
            return
        self.kept = (absmax.contiguous(), absmax_8bit.contiguous(), absmax_code.contiguous(), absmax_offset.float())
        self.addresses = tuple(tensor.data_ptr() for tensor in self.kept)


def decoded(absmax: Tensor, absmax_8bit: Tensor, absmax_code: Tensor, absmax_offset: Tensor, numbers: Tensor) -> Tensor:
    """fp32 absmax of the blocks with those int64 ``numbers``, of their shape, from double-quantized ones."""
    codes, second = absmax_8bit.reshape(-1)[numbers], absmax.reshape(-1)[numbers // blocks.NESTED_BLOCKSIZE]
    return absmax_code[codes.int()] * second + absmax_offset.float()
