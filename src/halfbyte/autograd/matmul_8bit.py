"""``matmul``: activation times int8 weight by LLM.int8(), with gradients to activation, bias and a 16-bit weight."""

# CB and SCB are bitsandbytes' names, not constants.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from halfbyte.autograd.function import bias_gradient, direct_apply
from halfbyte.backends import registry
from halfbyte.errors import QuantStateMissingError
from halfbyte.functional import int8_vectorwise_dequant, int8_vectorwise_quant

__all__ = ["MatMul8bitFp", "MatMul8bitLt", "MatmulLtState", "matmul", "repeated_matmul"]

_ops = torch.ops.halfbyte


@dataclass
class MatmulLtState:
    """Settings of an LLM.int8() product and, where no layer owns them, the weight's codes and scales.

    Attributes:
        CB: int8 codes of the weight, ``(N, K)``.
        SCB: fp32 absmax of the weight's rows, ``(N,)``.
        threshold: Activations of at least this magnitude are outliers, multiplied in full precision; 0 for none.
        has_fp16_weights: The weight stays in 16 or 32 bits, is quantized in each forward pass, and can be trained.
        is_training: Whether the layer is in training mode.
        force_no_igemmlt, SB, SBt, CBt, subB, outlier_pool, idx, has_accumulated_gradients, use_pool: Kept for callers
            that set them; nothing reads them.
    """

    force_no_igemmlt: bool = False
    CB: Tensor | None = None
    SB: Tensor | None = None
    SCB: Tensor | None = None
    SBt: Tensor | None = None
    CBt: Tensor | None = None
    subB: Tensor | None = None  # noqa: N815 - bitsandbytes' name
    outlier_pool: Any = None
    idx: Tensor | None = None

    has_accumulated_gradients = False
    threshold = 0.0
    is_training = True
    has_fp16_weights = True
    use_pool = False

    _gone: ClassVar[frozenset[str]] = frozenset({"CxB", "CxBt", "formatB", "_tile_indices"})

    def __getattr__(self, name: str) -> None:
        if name in MatmulLtState._gone:
            warnings.warn(f"MatmulLtState.{name} is always None: weights lie in rows", FutureWarning, stacklevel=2)
            return
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def reset_grads(self) -> None:
        """Forget codes and scales; the next product quantizes the weight it is given."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None


class MatMul8bitLt(torch.autograd.Function):
    """``A @ weight.T + bias`` by LLM.int8().

    The activation's gradient passes through the quantized weight. A weight that is kept in 16 or 32 bits gets
    ``grad.T @ A`` in the activation's dtype, as from an unquantized layer.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Tensor:
        state = MatmulLtState() if state is None else state
        CB, SCB, full = _operands(B, state)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.weight_dtype = B.dtype
        ctx.save_for_backward(A if ctx.needs_input_grad[1] else None, CB, SCB)
        result = _call("int8_linear", A)(A, CB, SCB, state.threshold, bias, full)
        return result if out is None else out.copy_(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, None]:
        (grad,) = grads
        A, CB, SCB = ctx.saved_tensors
        grad_A = grad_B = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_A = _gradient(grad, CB, SCB)
        if ctx.needs_input_grad[1]:
            grad_B = torch.matmul(grad.reshape(-1, grad.shape[-1]).t(), A.reshape(-1, A.shape[-1])).to(ctx.weight_dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = bias_gradient(grad, ctx.bias_dtype)
        return grad_A, grad_B, None, grad_bias, None


class MatMul8bitFp(MatMul8bitLt):
    """``A @ weight.T + bias`` in A's dtype with the dequantized weight: no int8 product, no outliers.

    Gradients are those of :class:`MatMul8bitLt`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Tensor:
        CB, SCB, full = _operands(B, MatmulLtState() if state is None else state)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.weight_dtype = B.dtype
        ctx.save_for_backward(A if ctx.needs_input_grad[1] else None, CB, SCB)
        weight = int8_vectorwise_dequant(CB, SCB) if full is None else full
        result = torch.nn.functional.linear(A, weight.to(A.dtype), None if bias is None else bias.to(A.dtype))
        return result if out is None else out.copy_(result)


class _RepeatedMatMul(torch.autograd.Function):
    """:class:`MatMul8bitLt` of a layer that knows a short way to the product of an activation with its int8 weight.

    It saves what the other one saves: checkpointing allows no difference between a forward pass and its repetition.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        A: Tensor,
        CB: Tensor,
        SCB: Tensor,
        bias: Tensor | None,
        threshold: float,
        call: Callable[[Tensor], Tensor | None],
    ) -> Tensor:
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(CB, SCB)
        result = call(A)
        return _call("int8_linear", A)(A, CB, SCB, threshold, bias, None) if result is None else result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:
        (grad,) = grads
        CB, SCB = ctx.saved_tensors
        grad_A = _gradient(grad, CB, SCB) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[3]:
            grad_bias = bias_gradient(grad, ctx.bias_dtype)
        return grad_A, None, None, grad_bias, None, None


_apply_repeated = direct_apply(_RepeatedMatMul)


def repeated_matmul(
    A: Tensor,
    CB: Tensor,
    SCB: Tensor,
    bias: Tensor | None,
    threshold: float,
    call: Callable[[Tensor], Tensor | None],
) -> Tensor:
    """:func:`matmul` where a short way is known, with gradients; not under transforms of torch.func.

    Args:
        A: ``(..., K)``.
        CB: int8 codes ``(N, K)``.
        SCB: fp32 absmax of their rows.
        bias: ``(N,)``.
        threshold: Of outliers.
        call: Gives the product with A, or None where it cannot.

    Returns:
        ``(..., N)`` in A's dtype.
    """
    return _apply_repeated(A, CB, SCB, bias, threshold, call)


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """``A @ B.T + bias`` by LLM.int8(): int8 products with exact sums, outliers of ``A`` in full precision.

    Args:
        A: fp32, bf16 or fp16, ``(..., K)``; the result has its dtype.
        B: The weight ``(N, K)``: an Int8Params, int8 codes whose scales are in ``state``, or a floating-point weight,
            which is quantized here (once, if ``state.has_fp16_weights`` is False).
        out: Filled with the result where given.
        state: Settings, and codes and scales of the weight where B does not carry them.
        threshold: Overrides the state's where positive.
        bias: ``(N,)``; added in fp32.

    Returns:
        ``(..., N)``.

    Raises:
        QuantStateMissingError: int8 codes without scales.
        ArgumentError: Shapes or dtypes that do not fit each other.

    >>> x, w = torch.eye(2), torch.tensor([[1.0, 0.5], [0.0, -2.0]])
    >>> matmul(x, w).round(decimals=2).tolist()
    [[1.0, 0.0], [0.5, -2.0]]
    """
    state = MatmulLtState() if state is None else state
    if threshold > 0.0:
        state.threshold = threshold
    if torch.is_grad_enabled() and (A.requires_grad or B.requires_grad or (bias is not None and bias.requires_grad)):
        return MatMul8bitLt.apply(A, B, out, bias, state)  # pyright: ignore[reportReturnType]
    CB, SCB, full = _operands(B, state)
    result = _call("int8_linear", A)(A, CB, SCB, state.threshold, bias, full)
    return result if out is None else out.copy_(result)


def _call(op: str, A: Tensor) -> Callable[..., Tensor]:
    """The op; or, where nothing listens, what it calls: torch's dispatcher costs as much as a small GPU product."""
    return registry.kernel(op) if registry.undisturbed(A) else getattr(_ops, op)


def _gradient(grad: Tensor, CB: Tensor, SCB: Tensor) -> Tensor:
    """``grad @ weight``, ``(..., K)``."""
    if torch.is_grad_enabled() and grad.requires_grad:  # a second derivative is wanted: ops have none
        return torch.matmul(grad, int8_vectorwise_dequant(CB, SCB).to(grad.dtype))
    return _call("int8_linear_dgrad", grad)(grad, CB, SCB)


def _operands(B: Tensor, state: MatmulLtState) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes and scales of the weight, and the weight itself where it is not kept in int8."""
    # A parameter's own codes and scales belong together; a state may still hold those of the weight before it.
    scales: Tensor | None = getattr(B, "SCB", None)
    if scales is not None and B.dtype == torch.int8:
        if scales.device != B.device:  # a module that knows nothing of scales moved the codes
            scales = B.SCB = scales.to(B.device)  # pyright: ignore[reportAttributeAccessIssue]
        return B, scales, None
    if B.is_floating_point() and state.has_fp16_weights:
        weight = B.detach()
        codes, scales, _ = int8_vectorwise_quant(weight)
        return codes, scales, weight
    if state.CB is None and B.is_floating_point():
        state.CB, state.SCB, _ = int8_vectorwise_quant(B.detach())
    codes, scales = B.detach() if state.CB is None else state.CB, state.SCB
    if scales is None:
        raise QuantStateMissingError(
            f"int8 codes of shape {tuple(B.shape)} without their scales",
            expected="SCB on the weight or in the state",
            hint="load the layer's SCB key together with its weight",
        )
    return codes, scales, None
