"""Products with many experts on the CPU: each expert's rows through the product with one weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.backends.cpu.matmul import gemm_4bit, gemm_4bit_dgrad
from halfbyte.backends.cpu.scales import decoded
from halfbyte.backends.registry import implements
from halfbyte.formats import blocks

__all__ = ["gemm_4bit_grouped"]


@dataclass(frozen=True)
class _Stack:
    """The packed weights of all experts, cut into those of one without a copy wherever blocks allow."""

    packed: Tensor
    values: int
    blocksize: int
    absmax: Tensor
    absmax_8bit: Tensor | None
    absmax_code: Tensor | None
    absmax_offset: Tensor | None

    def scales(self, expert: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """``(absmax, absmax_8bit, absmax_code, absmax_offset)`` of one expert."""
        count = self.values // self.blocksize
        first, last = expert * count, (expert + 1) * count
        codes, table, offset = self.absmax_8bit, self.absmax_code, self.absmax_offset
        if codes is None or table is None or offset is None:
            return self.absmax[first:last], None, None, None
        size = blocks.NESTED_BLOCKSIZE
        if first % size == 0:
            return self.absmax[first // size : -(-last // size)], codes.reshape(-1)[first:last], table, offset
        # Its second-level blocks begin in the expert before: its scales are decoded for this call.
        return decoded(self.absmax, codes, table, offset, torch.arange(first, last)), None, None, None

    def codes(self, expert: int) -> Tensor:
        """Packed bytes of one expert."""
        size = self.values // 2
        return self.packed[expert * size : (expert + 1) * size]


@implements("cpu", "gemm_4bit_grouped")
def gemm_4bit_grouped(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    order: Tensor,
    ends: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    transposed: bool = False,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """Every row times its expert's weight; only the weights of experts that have rows are read."""
    _, rows, columns = shapeB
    activations = A.detach()
    packed = B.detach().contiguous().view(-1).view(torch.uint8)
    stack = _Stack(packed, rows * columns, blocksize, absmax.reshape(-1), absmax_8bit, absmax_code, absmax_offset)
    out = activations.new_zeros((order.numel(), columns if transposed else rows))
    repeat = order.numel() // max(1, activations.shape[0])
    first = 0
    for expert, end in enumerate(ends.tolist()):
        if end > first:
            own = order[first:end].long()
            x = activations[own // repeat]
            scales = stack.scales(expert)
            arguments = (x, stack.codes(expert), [rows, columns], scales[0], blocksize, quant_type)
            added = None if bias is None else bias.detach()[expert]
            if transposed:
                result = gemm_4bit_dgrad(*arguments, *scales[1:])
                result = result if added is None else result + added
            else:
                result = gemm_4bit(*arguments, added, *scales[1:])
            out[own] = result
        first = end
    return out
