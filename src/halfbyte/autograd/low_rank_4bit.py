"""A frozen 4-bit layer with a trained low-rank product beside it (LoRA), as one step of autograd.

Step by step, the sum of both takes a product of its own, a multiplication by the scaling, an addition and, in peft, a
copy of the layer's output: each reads and writes tensors as large as that output, forward and backward, and each costs
the host a launch and a node of the graph. Here the low-rank product is added inside its own matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.autograd.function import direct_apply

__all__ = ["low_rank_matmul_4bit"]


class _LowRankMatMul4Bit(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        layer: Any,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.layer, ctx.weight, ctx.quant_state = layer, layer.weight, layer.weight.quant_state
        ctx.scaling, ctx.own_input = scaling, dropped is not None
        beside = x if dropped is None else dropped
        result, middle = _forward(x, beside, down, up, scaling, layer, dtype)
        ctx.save_for_backward(beside, middle, down, up)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        beside, middle, own_down, own_up = ctx.saved_tensors
        grad = _cast(grads[0], beside.dtype).contiguous()
        down, up = _cast(own_down, grad.dtype), _cast(own_up, grad.dtype)
        wants_x, wants_dropped, wants_down, wants_up = ctx.needs_input_grad[:4]
        grad_x = ctx.layer.input_gradient(grad, ctx.weight, ctx.quant_state) if wants_x else None
        if torch.is_grad_enabled() and grad.requires_grad:  # a second derivative is wanted
            return *_differentiable(ctx, grad, grad_x, beside, own_down, own_up), None, None, None
        rows = grad.reshape(-1, grad.shape[-1])
        before = rows.new_empty(rows.shape[0], up.shape[1]).addmm_(rows, up, beta=0, alpha=ctx.scaling)
        grad_dropped = grad_down = grad_up = None
        if wants_down:
            grad_down = _cast(torch.mm(before.t(), beside.reshape(-1, beside.shape[-1])), own_down.dtype)
        if wants_up:
            grad_up = rows.new_empty(up.shape).addmm_(rows.t(), middle, beta=0, alpha=ctx.scaling)
            grad_up = _cast(grad_up, own_up.dtype)
        if ctx.own_input:
            grad_dropped = torch.mm(before, down).view(beside.shape) if wants_dropped else None
        elif grad_x is not None:
            grad_x.view(-1, grad_x.shape[-1]).addmm_(before, down)
        return grad_x, grad_dropped, grad_down, grad_up, None, None, None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _forward(
    x: Tensor, beside: Tensor, down: Tensor, up: Tensor, scaling: float, layer: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum, and ``beside @ down.T``."""
    down, up = _cast(down, x.dtype), _cast(up, x.dtype)
    result: Tensor = layer(x)
    middle = F.linear(beside.reshape(-1, beside.shape[-1]), down)
    if dtype is x.dtype:
        result.view(-1, result.shape[-1]).addmm_(middle, up.t(), alpha=scaling)
    else:
        result = result.to(dtype).add_(F.linear(middle, up).view(result.shape), alpha=scaling)
    return result, middle


def _differentiable(
    ctx: Any, grad: Tensor, grad_x: Tensor | None, beside: Tensor, down: Tensor, up: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The gradients in operations that have gradients themselves; the middle again, whose history was not kept."""
    before = torch.matmul(grad, up.to(grad.dtype)) * ctx.scaling
    middle = torch.matmul(beside, down.to(grad.dtype).t()) * ctx.scaling
    grad_down = torch.mm(before.flatten(0, -2).t(), beside.flatten(0, -2)).to(down.dtype)
    grad_up = torch.mm(grad.flatten(0, -2).t(), middle.flatten(0, -2)).to(up.dtype)
    through = torch.matmul(before, down.to(grad.dtype))
    if ctx.own_input:
        return grad_x, through, grad_down, grad_up
    return None if grad_x is None else grad_x + through, None, grad_down, grad_up


_apply = direct_apply(_LowRankMatMul4Bit)


def low_rank_matmul_4bit(
    x: Tensor, layer: Any, down: Tensor, up: Tensor, scaling: float, dropped: Tensor | None = None
) -> Tensor:
    """``layer(x) + scaling * (dropped @ down.T) @ up.T``; the sum is taken in fp32 and rounded once.

    Not under transforms of torch.func, which know no such step.

    Args:
        x: ``(..., K)``; cast to the layer's compute dtype.
        layer: A Linear4bit without a trained bias; its weight gets no gradient.
        down: ``(R, K)``; cast like x.
        up: ``(N, R)``; cast like x.
        scaling: Of the low-rank product.
        dropped: What stands in x's place in the low-rank product (x after dropout), cast like it;
            None is x.

    Returns:
        ``(..., N)`` in x's dtype.
    """
    dtype, computed = x.dtype, layer.compute_dtype_for(x)
    x, dropped = _cast(x, computed), None if dropped is None else _cast(dropped, computed)
    tensors = (x, down, up) if dropped is None else (x, dropped, down, up)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _apply(x, dropped, down, up, scaling, layer, dtype)
    beside = x if dropped is None else dropped
    return _forward(x, beside, down, up, scaling, layer, dtype)[0]
