"""``bitsandbytes.research`` and the layers that grew out of it, which bitsandbytes dropped in 0.50.

SwitchBack computes forward and the gradient of its input in int8 and the gradient of its weight in 16 bits, which is
what halfbyte's ``matmul`` does with a weight that is kept in 16 bits. The FP8 products simulate FP8 by rounding to its
values. Source: Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models",
arXiv:2304.13013.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.autograd import MatmulLtState, matmul
from halfbyte.errors import ArgumentError
from halfbyte.functional import create_fp8_map, dequantize_blockwise, quantize_blockwise

__all__ = [
    "LinearFP8Global",
    "LinearFP8Mixed",
    "StandardLinear",
    "SwitchBackLinear",
    "SwitchBackLinearBnb",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearVectorwise",
    "matmul_fp8_global",
    "matmul_fp8_mixed",
    "switchback_bnb",
]


def switchback_bnb(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """``A @ B.T + bias`` in int8; the weight's gradient in A's dtype."""
    state = MatmulLtState() if state is None else state
    state.has_fp16_weights = True
    return matmul(A, B, out, state, threshold, bias)


def _rounded(A: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """``A`` with every value replaced by the nearest of ``code``, in blocks scaled by their absmax."""
    codes, state = quantize_blockwise(A, code, blocksize=blocksize if blocksize > 0 else A.numel())
    return dequantize_blockwise(codes, state).to(A.dtype)


class _ProductFP8(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, A: Tensor, B: Tensor, fw_code: Tensor, bw_code: Tensor, bsz: int, bsz2: int, mixed: bool
    ) -> Tensor:
        ctx.save_for_backward(A, B)
        ctx.fw_code, ctx.bw_code, ctx.sizes, ctx.mixed = fw_code, bw_code, (bsz, bsz2), mixed
        return torch.matmul(_rounded(A, fw_code, bsz), _rounded(B, fw_code, bsz2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (A, B) = grads, ctx.saved_tensors
        bsz, bsz2 = ctx.sizes
        rounded = _rounded(grad.contiguous(), ctx.bw_code, bsz)
        grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_A = torch.matmul(rounded, _rounded(B, ctx.fw_code, bsz2).transpose(-1, -2))
        if ctx.needs_input_grad[1]:
            # "Mixed" keeps the weight's gradient in 16 bits.
            left, right = (A, grad) if ctx.mixed else (_rounded(A, ctx.fw_code, bsz), rounded)
            grad_B = torch.matmul(left.reshape(-1, left.shape[-1]).t(), right.reshape(-1, right.shape[-1]))
        return grad_A, grad_B, None, None, None, None, None


def _fp8(
    A: Tensor, B: Tensor, fw_code: Tensor | None, bw_code: Tensor | None, out: Tensor | None, sizes: Any, mixed: bool
) -> Tensor:
    if fw_code is None or bw_code is None:
        raise ArgumentError(
            "no code map", expected="fw_code and bw_code, such as functional.create_fp8_map(True, 4, 3)"
        )
    result: Any = _ProductFP8.apply(A, B, fw_code, bw_code, *sizes, mixed)
    return result if out is None else out.copy_(result)


def matmul_fp8_mixed(
    A: Tensor,
    B: Tensor,
    fw_code: Tensor | None = None,
    bw_code: Tensor | None = None,
    out: Tensor | None = None,
    bsz: int = -1,
    bsz2: int = -1,
) -> Tensor:
    """``A @ B`` of values rounded to ``fw_code``; gradients rounded to ``bw_code``, but the weight's in 16 bits.

    Args:
        A: ``(..., K)``.
        B: ``(K, N)``.
        fw_code: Map of 256 values for the forward pass.
        bw_code: Map of 256 values for gradients.
        out: Filled with the result where given.
        bsz: Values of A that share a scale; -1 for all.
        bsz2: The same for B.
    """
    return _fp8(A, B, fw_code, bw_code, out, (bsz, bsz2), True)


def matmul_fp8_global(
    A: Tensor,
    B: Tensor,
    fw_code: Tensor | None = None,
    bw_code: Tensor | None = None,
    out: Tensor | None = None,
    bsz: int = -1,
    bsz2: int = -1,
) -> Tensor:
    """:func:`matmul_fp8_mixed` with the weight's gradient from rounded values too."""
    return _fp8(A, B, fw_code, bw_code, out, (bsz, bsz2), False)


class StandardLinear(torch.nn.Linear):
    """``torch.nn.Linear``, under the name that experiments compare with."""


class SwitchBackLinear(torch.nn.Linear):
    """A linear layer that trains through int8 products: the weight is kept and quantized, by row, in each pass.

    Args:
        in_features: Length of the input's last dimension.
        out_features: Length of the output's last dimension.
        bias: Whether there is one.
        device: Where the weight is created.
        dtype: Of the weight.
        vector_wise_quantization: Kept for callers: activations and weights are always scaled by row, which is never
            less precise than by tensor.
        mem_efficient: Kept for callers: the weight's gradient needs the activation as it was.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        vector_wise_quantization: bool = False,
        mem_efficient: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.vector_wise_quantization = vector_wise_quantization
        self.mem_efficient = mem_efficient
        self.state: MatmulLtState | None = None

    def prepare_for_eval(self) -> None:
        """Quantize the weight once, for evaluation; call it again after it changed."""
        self.state = MatmulLtState()
        self.state.has_fp16_weights = False

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``x @ weight.T + bias``."""
        if not self.training and self.state is not None:
            return matmul(x, self.weight.detach(), state=self.state, bias=self.bias)
        return switchback_bnb(x, self.weight, bias=self.bias)


class SwitchBackLinearGlobal(SwitchBackLinear):
    """:class:`SwitchBackLinear`."""


class SwitchBackLinearVectorwise(SwitchBackLinear):
    """:class:`SwitchBackLinear`."""


class SwitchBackLinearBnb(SwitchBackLinear):
    """:class:`SwitchBackLinear` under the signature of Linear8bitLt.

    Args:
        input_features: Length of the input's last dimension.
        output_features: Length of the output's last dimension.
        bias: Whether there is one.
        has_fp16_weights: Only True.
        memory_efficient_backward: Kept for callers.
        threshold: Activations of at least this magnitude are multiplied in full precision.
        index: Kept for callers.
        device: Where the weight is created.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        memory_efficient_backward: bool = False,
        threshold: float = 0.0,
        index: Any = None,
        device: Any = None,
    ) -> None:
        if not has_fp16_weights:
            raise ArgumentError(
                "SwitchBackLinearBnb(has_fp16_weights=False)", expected="True", hint="Linear8bitLt keeps int8 weights"
            )
        super().__init__(input_features, output_features, bias, device, mem_efficient=memory_efficient_backward)
        self.threshold, self.index = threshold, index

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``."""
        return switchback_bnb(x, self.weight, threshold=self.threshold, bias=self.bias)


class LinearFP8Mixed(torch.nn.Linear):
    """A linear layer through :func:`matmul_fp8_mixed`: E4M3 forward, E5M2 gradients.

    Args:
        input_features: Length of the input's last dimension.
        output_features: Length of the output's last dimension.
        bias: Whether there is one.
    """

    mixed = True

    def __init__(self, input_features: int, output_features: int, bias: bool = True) -> None:
        super().__init__(input_features, output_features, bias)
        self.fw_code = create_fp8_map(True, 4, 3, 8)
        self.bw_code = create_fp8_map(True, 5, 2, 8)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``x @ weight.T + bias``."""
        codes = (self.fw_code.to(x.device), self.bw_code.to(x.device))
        product = _fp8(x, self.weight.t(), *codes, None, (-1, -1), self.mixed)
        bias: Any = self.bias
        return product if bias is None else product + bias


class LinearFP8Global(LinearFP8Mixed):
    """:class:`LinearFP8Mixed` through :func:`matmul_fp8_global`."""

    mixed = False
