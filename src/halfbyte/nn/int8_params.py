"""Int8Params: a parameter that becomes int8 codes with a scale per row the first time it is moved to a device."""

# CB and SCB are bitsandbytes' names, not constants.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError
from halfbyte.functional import int8_vectorwise_quant
from halfbyte.nn.moves import Moves

__all__ = ["Int8Params"]


class Int8Params(Moves, torch.nn.Parameter):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A weight that is quantized once, on its first move to a real device, and then holds int8 codes.

    Codes and scales are one: ``CB`` is the parameter's own data and exists only together with ``SCB``, which follows
    every move, copy and pickle. Everything in its ``__dict__`` is a keyword of the constructor.

    Args:
        data: The weight (fp32, bf16, fp16), or int8 codes.
        requires_grad: Of a floating-point weight; codes have no gradient.
        has_fp16_weights: Never quantize: the layer quantizes in each forward pass.
        CB: int8 codes, where they are not ``data``.
        SCB: fp32 absmax of every row of codes, also an attribute.
        **kwargs: Set as attributes: loaders mark parameters with their own.

    >>> weight = Int8Params(torch.tensor([[1.0, -2.0]]), requires_grad=False).to("cpu")
    >>> weight.CB.tolist(), weight.SCB.tolist()
    ([[64, -127]], [2.0])
    """

    has_fp16_weights: bool
    SCB: Tensor | None

    if TYPE_CHECKING:

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **kwargs: Any,
    ) -> Int8Params:
        if CB is not None and (data is None or data.dtype != torch.int8):
            data = CB
        if data is None:
            data = torch.empty(0)
        requires_grad = requires_grad and data.is_floating_point()
        self = torch.Tensor._make_subclass(cls, data, requires_grad)  # pyright: ignore[reportPrivateUsage]
        self.has_fp16_weights = has_fp16_weights
        # Some callers pass an old parameter's attributes on with new, unquantized values.
        self.SCB = SCB if data.dtype == torch.int8 else None
        for name, value in kwargs.items():
            setattr(self, name, value)
        return self

    @property
    def CB(self) -> Tensor | None:  # noqa: N802 - bitsandbytes' name
        """The int8 codes, which are the parameter's data; None unless there are scales too. Setting None is ignored."""
        return None if self.SCB is None or self.dtype != torch.int8 else self.data

    @CB.setter
    def CB(self, value: Tensor | None) -> None:  # noqa: N802
        if value is None or value is self:
            return
        if value.dtype != torch.int8:
            raise ArgumentError(f"CB is {value.dtype}", expected="int8")
        self.requires_grad = False
        self.data = value

    def _quantize(self, device: torch.device | str | int) -> Int8Params:
        """Quantize in place on ``device``, from the weight's own dtype. Returns itself.

        Raises:
            ArgumentError: A weight that is no float, or holds NaN or inf. The parameter stays as it was.
        """
        weight = self.data.contiguous().to(device)
        codes, scales, _ = int8_vectorwise_quant(weight)
        if not bool(torch.isfinite(scales).all()):
            bad = int((~torch.isfinite(weight)).sum())
            raise ArgumentError(
                f"a weight of shape {tuple(weight.shape)} holds {bad} NaN or inf values",
                expected="finite values",
                hint="the checkpoint is damaged, or overflowed when it was cast to float16: load it in bfloat16",
            )
        self.requires_grad = False
        self.data = codes
        self.SCB = scales
        return self

    def to(self, *args: Any, **kwargs: Any) -> Int8Params:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move. The first move to a real device quantizes, in place; codes never change their dtype."""
        if args and type(args[0]) is int and not torch.accelerator.is_available():
            # accelerate sends 8-bit weights that stay on the CPU through device 0, to have them quantized.
            args = (self.device if self.device.type == "meta" else "cpu", *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        if self.dtype == torch.int8:
            if device is None and dtype is not None:
                return self
            return self._like(self.data.to(device=device, non_blocking=non_blocking), self._scales_for(device))
        if device is not None and "meta" not in {device.type, self.device.type} and not self.has_fp16_weights:
            return self._quantize(device)
        return self._like(super().to(*args, **kwargs), None)

    def _scales_for(self, device: torch.device | None) -> Tensor | None:
        """The scales beside codes on ``device``. On meta only the codes are given up."""
        scales = self.SCB
        return scales if scales is None or device is None or device.type == "meta" else scales.to(device)

    def adopted(self, applied: Tensor) -> Int8Params:
        """The parameter after ``Module._apply`` turned it into ``applied``: itself wherever torch allows."""
        if applied is self:
            return self
        scales = self._scales_for(applied.device) if self.dtype == torch.int8 else None
        if "meta" in {applied.device.type, self.device.type} and applied.device != self.device:
            return self._like(applied.data, scales)
        self.data = applied.data
        self.SCB = scales
        return self

    def _like(self, data: Tensor, scales: Tensor | None) -> Int8Params:
        """A parameter of the same settings around other data."""
        # accelerate and peft write requires_grad into the dictionary as well.
        settings: dict[str, Any] = {**vars(self), "requires_grad": self.requires_grad, "SCB": scales}
        return Int8Params(data, **settings)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # torch would rebuild a plain Parameter.
        return _rebuild, (self.data, self.requires_grad, dict(vars(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Params:
        if id(self) in memo:
            return memo[id(self)]
        scales = None if self.SCB is None else self.SCB.clone()
        twin = self._like(self.data.clone(memory_format=torch.preserve_format), scales)
        memo[id(self)] = twin
        return twin


def _rebuild(data: Tensor, requires_grad: bool, attributes: dict[str, Any]) -> Int8Params:
    parameter = Int8Params(data, requires_grad=requires_grad)
    vars(parameter).update(attributes)
    return parameter
