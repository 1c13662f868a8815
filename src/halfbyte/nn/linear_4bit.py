"""Linear layers whose weight is kept in 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.autograd.matmul_4bit import gradient_4bit, matmul_4bit
from halfbyte.errors import CheckpointError, QuantStateMissingError
from halfbyte.nn.compute_dtype import compute_dtype_for
from halfbyte.nn.holds_4bit import Holds4bit
from halfbyte.nn.params import Params4bit
from halfbyte.nn.repeated_4bit import Repeated4bit
from halfbyte.quant_state import QuantState

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4", "fix_4bit_weight_quant_state_from_module"]


class Linear4bit(Holds4bit, torch.nn.Linear):
    """``torch.nn.Linear`` with a weight that becomes 4-bit codes on its first move to a device.

    Args:
        input_features: Length of the input's last dimension.
        output_features: Length of the output's last dimension.
        bias: Whether there is one; it stays in its own dtype.
        compute_dtype: dtype of the product. None takes a 16-bit input's own and, for fp32 inputs, what the device
            multiplies natively (see :func:`halfbyte.nn.compute_dtype.default_compute_dtype`).
        compress_statistics: Double quantization of the scales.
        quant_type: ``"nf4"`` or ``"fp4"``.
        quant_storage: dtype under which the packed bytes appear.
        device: Where the unquantized weight is created.

    >>> layer = Linear4bit(64, 32, quant_type="nf4").to("cpu")
    >>> layer.weight.shape, layer(torch.zeros(2, 64)).shape
    (torch.Size([1024, 1]), torch.Size([2, 32]))
    """

    bias: Any
    _repeated: Repeated4bit | None = None

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``x @ weight.T + bias``, computed in the compute dtype, returned in x's."""
        if not torch.compiler.is_compiling() and self._repeated is not None:  # no graph is to depend on the latter
            repeated = self._repeated.product(self, x)
            if repeated is not None:
                return repeated
        state = getattr(self.weight, "quant_state", None)
        if state is None:
            # torch.export puts plain parameters in place, and takes them out again: nothing to mend there.
            if self.quant_state is None or not torch.compiler.is_compiling():
                fix_4bit_weight_quant_state_from_module(self)
            state = self.quant_state
        dtype = self.compute_dtype_for(x)
        if x.dtype != dtype:
            return Linear4bit.forward(self, x.to(dtype)).to(x.dtype)
        bias = self.bias
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        result = matmul_4bit(x, self.weight, state, bias=bias)
        if not torch.compiler.is_compiling() and state is not None:
            self.__dict__["_repeated"] = Repeated4bit.after(self, x, self.weight, state, bias)
        return result

    def input_gradient(self, grad: Tensor, weight: Tensor, state: QuantState) -> Tensor:
        """``grad @ weight``: the gradient to the input of a product of this layer, ``(..., K)`` from ``(..., N)``.

        Args:
            grad: To the product.
            weight: Of that product: the layer may have another one by now.
            state: The weight's.
        """
        grad = grad.contiguous()
        repeated = None if torch.compiler.is_compiling() else self._repeated
        found = None if repeated is None else repeated.gradient(grad, weight)
        if found is not None:
            return found
        result = gradient_4bit(grad, weight, state)
        if repeated is not None:
            repeated.learn_gradient(grad, weight, state)
        return result

    def compute_dtype_for(self, x: Tensor) -> torch.dtype:
        """The dtype in which the product with ``x`` is computed."""
        return compute_dtype_for(x, self.compute_dtype)

    def set_compute_type(self, x: Tensor) -> None:
        """Kept for callers: :meth:`compute_dtype_for` chooses in each forward pass, and nothing is remembered."""

    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _check_others(self, state_dict: dict[str, Any], prefix: str) -> None:
        bias = state_dict.get(f"{prefix}bias")
        if bias is not None and self.bias is not None and bias.shape != (self.out_features,):
            raise CheckpointError(f"bias has shape {tuple(bias.shape)}", expected=f"({self.out_features},)")


class LinearFP4(Linear4bit):
    """:class:`Linear4bit` with FP4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )


class LinearNF4(Linear4bit):
    """:class:`Linear4bit` with NF4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )


def fix_4bit_weight_quant_state_from_module(module: Any) -> None:
    """Give a weight its quant_state back from its layer: sharding wrappers and savers lose it.

    Raises:
        QuantStateMissingError: The layer has none either: it was never quantized.
    """
    if getattr(module.weight, "quant_state", None) is not None:
        return
    if getattr(module, "quant_state", None) is None:
        raise QuantStateMissingError(
            f"{type(module).__name__} was called before its weight was quantized",
            expected="one move to a device, which quantizes",
            hint='call layer.to("cuda") or layer.to("cpu") first',
        )
    if not isinstance(module.weight, Params4bit):
        module.weight = Params4bit(module.weight.data, quant_storage=module.quant_storage, bnb_quantized=True)
    module.weight.quant_state = module.quant_state
    module.weight.module = module
