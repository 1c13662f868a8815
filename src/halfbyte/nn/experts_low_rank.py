"""What a low-rank adapter of stacked experts adds to their product, without a dense weight for any of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["low_rank"]


def low_rank(x: Tensor, order: Tensor, ends: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """``scaling * up[e] @ down[e] @ x`` for every product, ``e`` being its expert; zeros where it has none.

    Args:
        x: ``(rows, K)``.
        order: From :func:`halfbyte.autograd.grouped_4bit.group_rows`, as ``ends``.
        ends: Where each expert's products end.
        down: ``(experts, rank, K)``.
        up: ``(experts, N, rank)``.
        scaling: Factor.

    Returns:
        ``(products, N)`` in x's dtype.
    """
    rows = order.long()
    # torch leaves rows without expert as memory was, in products and in their gradients: zeros on both sides of each.
    lonely = (torch.arange(rows.numel(), device=ends.device) >= ends[-1]).unsqueeze(1)
    picked = x[rows // (rows.numel() // x.shape[0])].masked_fill(lonely, 0.0)
    inner = _grouped(picked, down.to(x.dtype), ends).masked_fill(lonely, 0.0)
    outer = _grouped(inner, up.to(x.dtype), ends).masked_fill(lonely, 0.0) * scaling
    return torch.zeros_like(outer).index_copy(0, rows, outer)


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows sorted by expert times their experts' weights ``(experts, N, K)``."""
    torch_has: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    fits = x.is_cuda and x.dtype == torch.bfloat16 and weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0
    if fits and torch_has is not None and torch.cuda.get_device_capability(x.device) >= (9, 0):
        return torch_has(x, weight.transpose(1, 2), offs=ends)
    parts: list[Tensor] = []
    first = 0
    for expert, end in enumerate(ends.tolist()):
        parts.append(torch.nn.functional.linear(x[first:end], weight[expert]))
        first = end
    parts.append(x.new_zeros((x.shape[0] - first, weight.shape[1])))
    return torch.cat(parts)
