"""``grouped_matmul_4bit``: rows times their experts' packed 4-bit weights; gradients to the rows and the bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte import backends as _backends  # defines and binds the ops
from halfbyte.errors import QuantStateMissingError
from halfbyte.functional import dequantize_4bit, format_of, kernel_scales
from halfbyte.quant_state import QuantState

__all__ = ["GroupedMatMul4Bit", "group_rows", "grouped_matmul_4bit"]

_ops = torch.ops.halfbyte
del _backends


def group_rows(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """How :func:`grouped_matmul_4bit` is told which row belongs to which expert.

    Args:
        experts: int64 or int32, any shape: the expert of every product. Numbers that are no expert's belong to none.
        count: Experts that there are.

    Returns:
        ``order``, int32: numbers of the products, sorted by expert; ``ends``, int32 ``(count,)``: where in ``order``
        each expert's end.

    >>> [tensor.tolist() for tensor in group_rows(torch.tensor([[2, 0], [0, 9]]), 3)]
    [[1, 2, 0, 3], [2, 2, 3]]
    """
    return _ops.group_rows(experts, count)


class GroupedMatMul4Bit(torch.autograd.Function):
    """The product for every row; keeps only the packed weight and the routing. The weight gets no gradient."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        A: Tensor,
        B: Tensor,
        order: Tensor,
        ends: Tensor,
        bias: Tensor | None,
        quant_state: QuantState,
        transposed: bool,
    ) -> Tensor:
        ctx.quant_state, ctx.transposed, ctx.rows = quant_state, transposed, A.shape[0]
        ctx.save_for_backward(B, order, ends, bias)
        return _product(A, B, order, ends, bias, quant_state, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        B, order, ends, bias = ctx.saved_tensors
        grad_A = grad_bias = None
        if bias is not None and ctx.needs_input_grad[4]:
            places = torch.arange(order.numel(), device=order.device, dtype=ends.dtype)
            expert = torch.searchsorted(ends, places, right=True)
            # Rows without expert go into one row more than there are experts.
            sums = bias.new_zeros((bias.shape[0] + 1, bias.shape[1]), dtype=torch.float32)
            grad_bias = sums.index_add(0, expert, grad[order.long()].float())[:-1].to(bias.dtype)
        if ctx.needs_input_grad[0]:
            state: QuantState = ctx.quant_state
            if torch.is_grad_enabled() and grad.requires_grad:  # a second derivative is wanted: ops have none
                each = _dense(grad, B, order, ends, state, not ctx.transposed)
            else:
                each = _product(grad.contiguous(), B, order, ends, None, state, not ctx.transposed)
            grad_A = each.view(ctx.rows, -1, each.shape[-1]).sum(1) if ctx.rows != each.shape[0] else each
        return grad_A, None, None, None, grad_bias, None, None


def grouped_matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState | None,
    order: Tensor,
    ends: Tensor,
    *,
    transposed: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Product ``s`` is ``A[s // repeat] @ weight[e].T + bias[e]``, with ``e`` its expert; zeros where it has none.

    Args:
        A: fp32, bf16 or fp16, ``(rows, K)``; ``repeat`` is the number of products over the number of rows.
        B: Packed codes of weights ``(experts, N, K)``.
        quant_state: Their QuantState; each expert is whole blocks.
        order: From :func:`group_rows`, as ``ends``.
        ends: Where each expert's products end.
        transposed: The weights are stored ``(experts, K, N)``: no ``.T``.
        bias: ``(experts, N)``, cast to A's dtype.

    Returns:
        ``(products, N)`` in A's dtype.

    Raises:
        QuantStateMissingError: No quant_state.
        ArgumentError: Shapes or dtypes that do not fit each other.
    """
    if quant_state is None:
        raise QuantStateMissingError(
            "the experts' 4-bit weight has no quant_state",
            expected="one from quantize_4bit or Params4bit",
            hint="move the module to its device once, or load its state dict with the companion keys",
        )
    if bias is not None and bias.dtype != A.dtype:
        bias = bias.to(A.dtype)
    if torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad)):
        return GroupedMatMul4Bit.apply(A, B, order, ends, bias, quant_state, transposed)  # pyright: ignore[reportReturnType]
    return _product(A, B, order, ends, bias, quant_state, transposed)


def _product(
    A: Tensor, B: Tensor, order: Tensor, ends: Tensor, bias: Tensor | None, state: QuantState, transposed: bool
) -> Tensor:
    shape, blocksize, kind, _ = format_of(state)
    scales = kernel_scales(state)
    return _ops.gemm_4bit_grouped(A, B, shape, order, ends, scales[0], blocksize, kind, transposed, bias, *scales[1:])


def _dense(A: Tensor, B: Tensor, order: Tensor, ends: Tensor, state: QuantState, transposed: bool) -> Tensor:
    """The product by dequantized weights, in operations that torch can differentiate."""
    weight = dequantize_4bit(B, state).to(A.dtype)
    weight = weight.transpose(1, 2) if transposed else weight
    places = torch.arange(order.numel(), device=order.device, dtype=ends.dtype)
    expert = torch.searchsorted(ends, places, right=True)
    parts = [
        torch.where((expert == number).unsqueeze(1), A[order.long()] @ weight[number].T, 0.0)
        for number in range(weight.shape[0])
    ]
    inverse = torch.argsort(order)
    return torch.stack(parts).sum(0)[inverse]
