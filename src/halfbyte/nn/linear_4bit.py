"""Linear layers whose weight is kept in 4 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.autograd import matmul_4bit
from halfbyte.errors import CheckpointError, HalfbyteError, QuantStateMissingError
from halfbyte.nn.compute_dtype import default_compute_dtype
from halfbyte.nn.params import Params4bit
from halfbyte.ops.arguments import check_packed, check_storage_dtype
from halfbyte.quant_state import QuantState

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4", "fix_4bit_weight_quant_state_from_module"]


class Linear4bit(torch.nn.Linear):
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

    weight: Any  # a Params4bit; sharding wrappers put their own parameters here
    bias: Any

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
        state = getattr(self.weight, "quant_state", None)
        if state is None:
            # torch.export puts plain parameters in place, and takes them out again: nothing to mend there.
            if self.quant_state is None or not torch.compiler.is_compiling():
                fix_4bit_weight_quant_state_from_module(self)
            state = self.quant_state
        dtype = self.compute_dtype_for(x)
        bias = self.bias
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        if x.dtype == dtype:
            return matmul_4bit(x, self.weight, state, bias=bias)
        return matmul_4bit(x.to(dtype), self.weight, state, bias=bias).to(x.dtype)

    def compute_dtype_for(self, x: Tensor) -> torch.dtype:
        """The dtype in which the product with ``x`` is computed."""
        if self.compute_dtype is not None:
            return self.compute_dtype
        if x.dtype in (torch.bfloat16, torch.float16):
            return x.dtype
        return default_compute_dtype(x.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        # torch would copy the data into the old parameter but leave its quant_state where it was.
        weight = self.weight
        if not isinstance(weight, Params4bit):
            super()._apply(fn, recurse)
            return self
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)
            self.weight = weight.adopted(fn(weight))
        except BaseException:
            self._parameters["weight"] = weight
            raise
        self.weight.module = self
        self.quant_state = self.weight.quant_state
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        weight: Any = self._parameters.get("weight")
        if not isinstance(weight, Params4bit) and getattr(weight, "quant_state", None) is not None:
            # bitsandbytes pickles the attributes of a weight but not its class.
            settings: dict[str, Any] = {**vars(weight), "module": self, "requires_grad": False}
            self.weight = Params4bit(weight.data, **settings)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None)
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes packed codes with their ``weight.*`` keys, or plain values (quantized if this layer is)."""
        stats_prefix = f"{prefix}weight."
        stats = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(stats_prefix)}
        weight = state_dict.get(f"{prefix}weight")
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            if stats and weight is None:
                raise CheckpointError(f"{stats_prefix}* without {prefix}weight", expected="both")
            loaded = None if weight is None else self._loadable(weight, stats, assign)
            self._check_bias(state_dict.get(f"{prefix}bias"))
        except HalfbyteError as error:
            error_msgs.append(f"{prefix}weight: {error}")
            # The bias must not change either.
            for name in ("weight", "bias"):
                state_dict.pop(prefix + name, None)
            return
        if loaded is not None:
            del state_dict[f"{prefix}weight"]
        shown: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, shown, unexpected_keys, error_msgs)
        missing_keys += [key for key in shown if loaded is None or key != f"{prefix}weight"]
        if loaded is not None:
            if assign or not isinstance(self.weight, Params4bit) or not self.weight.takes(loaded):
                self.weight = loaded
            self.weight.module = self
            self.quant_state = loaded.quant_state

    def _loadable(self, weight: Tensor, stats: dict[str, Any], assign: bool) -> Params4bit | None:
        """The parameter that a state dict's weight becomes; None where torch can copy it as it is."""
        shape = (self.out_features, self.in_features)
        device = weight.device if assign or self.weight.device.type == "meta" else self.weight.device
        if stats:
            state = QuantState.from_dict(stats, device)
            if state.shape != torch.Size(shape):
                raise CheckpointError(f"a 4-bit weight of shape {tuple(state.shape or ())}", expected=f"{shape}")
            check_storage_dtype(weight.dtype)
            check_packed(weight, self.out_features * self.in_features)
            data = weight.detach().to(device)
            if not assign:  # the layer must not change with the caller's dictionary
                state, data = copy.deepcopy(state), data.clone()
            return Params4bit._from_state(data, state, False, None)  # pyright: ignore[reportPrivateUsage]
        if weight.shape == shape and weight.is_floating_point():
            if not self.weight.bnb_quantized:
                return None
            settings: dict[str, Any] = {
                **vars(self.weight),
                "bnb_quantized": False,
                "quant_state": None,
                "module": None,
                "requires_grad": False,
            }
            return Params4bit(weight.detach().clone(), **settings).to(device)
        if weight.shape[1:] == (1,):
            raise CheckpointError(
                f"packed 4-bit codes of shape {tuple(weight.shape)} without their weight.* keys",
                expected="weight.absmax, weight.quant_map and weight.quant_state.* beside the weight",
                hint="save the whole state dict of the 4-bit layer",
            )
        raise CheckpointError(f"weight is {weight.dtype} of shape {tuple(weight.shape)}", expected=f"floats of {shape}")

    def _check_bias(self, bias: Tensor | None) -> None:
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
