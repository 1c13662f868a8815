"""``matmul_4bit``: activation times packed 4-bit weight, with the gradient to the activation and the bias."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.autograd.function import bias_gradient, direct_apply
from halfbyte.backends import registry
from halfbyte.errors import QuantStateMissingError
from halfbyte.functional import dequantize_4bit, format_of, kernel_scales
from halfbyte.quant_state import QuantState

__all__ = ["MatMul4Bit", "gradient_4bit", "matmul_4bit", "repeated_matmul_4bit"]

_ops = torch.ops.halfbyte
_DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass  # pyright: ignore[reportPrivateUsage]


class MatMul4Bit(torch.autograd.Function):
    """``A @ weight.T + bias``; keeps only the packed weight for the backward pass. The weight gets no gradient."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, A: Tensor, B: Tensor, out: Tensor | None, bias: Tensor | None, quant_state: QuantState
    ) -> Tensor:
        ctx.quant_state = quant_state
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(B)
        result = _product(A, B, quant_state, bias, registry.undisturbed(A))
        return result if out is None else out.copy_(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        (grad,) = grads
        (B,) = ctx.saved_tensors
        grad_A = grad_bias = None
        if ctx.needs_input_grad[3]:
            grad_bias = bias_gradient(grad, ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            grad_A = gradient_4bit(grad, B, ctx.quant_state)
        return grad_A, None, None, grad_bias, None


class _RepeatedMatMul4Bit(torch.autograd.Function):
    """:class:`MatMul4Bit` of a layer that knows short ways for the product and its gradient.

    It saves what the other one saves: checkpointing allows no difference between a forward pass and its repetition.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, A: Tensor, B: Tensor, bias: Tensor | None, layer: Any, call: Callable[[Tensor], Tensor | None]
    ) -> Tensor:
        ctx.layer, ctx.weight, ctx.quant_state = layer, B, B.quant_state  # pyright: ignore[reportAttributeAccessIssue]
        ctx.save_for_backward(B)
        result = call(A)
        return _product(A, B, ctx.quant_state, bias, direct=True) if result is None else result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        (grad,) = grads
        grad_A = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = bias_gradient(grad, grad.dtype)  # the bias has the dtype of the product here
        if ctx.needs_input_grad[0]:
            grad_A = ctx.layer.input_gradient(grad, ctx.weight, ctx.quant_state)
        return grad_A, None, grad_bias, None, None


_apply_repeated = direct_apply(_RepeatedMatMul4Bit)


def repeated_matmul_4bit(
    A: Tensor, B: Tensor, bias: Tensor | None, layer: Any, call: Callable[[Tensor], Tensor | None]
) -> Tensor:
    """:func:`matmul_4bit` of a layer that knows a short way, with gradients; not under transforms of torch.func.

    Args:
        A: ``(..., K)``.
        B: The layer's Params4bit.
        bias: The layer's own, in A's dtype.
        layer: Gives the gradient: ``layer.input_gradient(grad, B, B.quant_state)``.
        call: Gives the product with A, or None where it cannot.

    Returns:
        ``(..., N)`` in A's dtype.
    """
    return _apply_repeated(A, B, bias, layer, call)


def gradient_4bit(grad: Tensor, B: Tensor, quant_state: QuantState) -> Tensor:
    """``grad @ weight``: the gradient of a 4-bit product to its activation.

    Args:
        grad: ``(..., N)``; the product is computed and returned in its dtype.
        B: Packed codes of a weight ``(N, K)``.
        quant_state: The weight's.

    Returns:
        ``(..., K)``.
    """
    if torch.is_grad_enabled() and grad.requires_grad:  # a second derivative is wanted: ops have none
        return torch.matmul(grad, dequantize_4bit(B, quant_state).to(grad.dtype))
    shape, blocksize, kind, _ = format_of(quant_state)
    scales = kernel_scales(quant_state)
    call = _call("gemm_4bit_dgrad", registry.undisturbed(grad))
    return call(grad, B, shape, scales[0], blocksize, kind, *scales[1:])


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState | None,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``A @ weight.T + bias`` where ``B`` holds the weight's packed codes.

    Args:
        A: fp32, bf16 or fp16, ``(..., K)``; the product is computed and returned in its dtype.
        B: Packed codes, ``(bytes, 1)`` or its transpose, of a weight ``(N, K)``.
        quant_state: The weight's QuantState.
        out: Filled with the result where given.
        bias: ``(N,)``; cast to A's dtype.

    Returns:
        ``(..., N)``.

    Raises:
        QuantStateMissingError: No quant_state.
        ArgumentError: Shapes or dtypes that do not fit each other.
    """
    if quant_state is None:
        raise QuantStateMissingError(
            "the 4-bit weight has no quant_state",
            expected="one from quantize_4bit or Params4bit",
            hint="move the layer to its device once, or load its state dict with the weight.* keys",
        )
    shape = quant_state.shape
    if shape is not None and len(shape) == 2 and shape[0] == A.shape[-1] != shape[1]:
        return _transposed(A, B, quant_state, bias)
    if torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad)):
        return MatMul4Bit.apply(A, B, out, bias, quant_state)  # pyright: ignore[reportReturnType]
    result = _product(A, B, quant_state, bias, registry.undisturbed(A))
    return result if out is None else out.copy_(result)


def _product(A: Tensor, B: Tensor, quant_state: QuantState, bias: Tensor | None, direct: bool = False) -> Tensor:
    shape, blocksize, kind, _ = format_of(quant_state)
    scales = kernel_scales(quant_state)
    if bias is not None and bias.dtype != A.dtype:
        bias = bias.to(A.dtype)
    return _call("gemm_4bit", direct)(A, B, shape, scales[0], blocksize, kind, bias, *scales[1:])


def _call(op: str, direct: bool) -> Callable[..., Tensor]:
    """The op, or what it calls in the end, for tensors that nothing listens to."""
    if not direct:
        return getattr(_ops, op)
    kernel = registry.kernel(op)

    def call(*args: Any) -> Tensor:
        with _DisableTorchFunctionSubclass():  # the parameter's own __torch_function__ would answer every question
            return kernel(*args)

    return call


def _transposed(A: Tensor, B: Tensor, quant_state: QuantState, bias: Tensor | None) -> Tensor:
    """The product with a weight that was quantized as ``(K, N)``, as old code did; slow."""
    warnings.warn(
        f"the weight was quantized with shape {tuple(quant_state.shape or ())}, input features first; "
        "quantize it as (out_features, in_features)",
        DeprecationWarning,
        stacklevel=3,
    )
    weight = dequantize_4bit(B.reshape(-1, 1), quant_state).to(A.dtype)
    product = torch.matmul(A, weight)
    return product if bias is None else product + bias.to(A.dtype)
