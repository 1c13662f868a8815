"""Products with many experts in plain torch, one expert after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.backends.reference.four_bit import dequantize_4bit
from halfbyte.backends.registry import implements

__all__ = ["gemm_4bit_grouped", "group_rows"]


@implements("reference", "group_rows")
def group_rows(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Numbers of the rows sorted by expert (in their order within one), and where each expert's end."""
    flat = experts.reshape(-1)
    foreign = (flat < 0) | (flat >= count)
    sorted_experts, order = torch.sort(torch.where(foreign, count, flat), stable=True)
    each = torch.arange(count, device=flat.device, dtype=flat.dtype)
    return order.int(), torch.searchsorted(sorted_experts, each, right=True, out_int32=True)


@implements("reference", "gemm_4bit_grouped")
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
    """Every row times its expert's weight, dequantized to A's dtype."""
    nested = (absmax_8bit, absmax_code, absmax_offset)
    weight = dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, A.dtype, *nested)
    weight = weight.transpose(1, 2) if transposed else weight
    out = A.new_zeros((order.numel(), weight.shape[1]))
    repeat = order.numel() // max(1, A.shape[0])
    first = 0
    for expert, end in enumerate(ends.tolist()):
        rows = order[first:end].long()
        if rows.numel():
            own = None if bias is None else bias[expert]
            out[rows] = torch.nn.functional.linear(A[rows // repeat], weight[expert], own)
        first = end
    return out
