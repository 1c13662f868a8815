"""Params4bit: a parameter that becomes packed 4-bit codes the first time it is moved to a device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError, CheckpointError
from halfbyte.formats import blocks
from halfbyte.functional import quantize_4bit
from halfbyte.nn.moves import Moves
from halfbyte.ops.arguments import check_packed
from halfbyte.quant_state import QuantState

__all__ = ["Params4bit"]

_SPLITS = (torch.chunk, torch.split, Tensor.chunk, Tensor.split)  # a tuple: torch 2.8 compiles no search in a set


class Params4bit(Moves, torch.nn.Parameter):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A weight that is quantized once, on its first move to a real device, and then holds packed codes.

    Everything in its ``__dict__`` is a keyword of the constructor: ``Params4bit(data, **old.__dict__)`` rebuilds one.

    Args:
        data: The weight (fp32, bf16, fp16), or packed codes where ``bnb_quantized``.
        requires_grad: Must be False: codes have no gradient.
        quant_state: QuantState of packed codes.
        blocksize: Values per block; None is 64.
        compress_statistics: Double quantization.
        quant_type: ``"nf4"`` or ``"fp4"``.
        quant_storage: dtype under which the packed bytes appear.
        module: The layer that owns it, whose ``quant_state`` follows.
        bnb_quantized: ``data`` holds packed codes.
        **kwargs: Set as attributes: loaders mark parameters with their own.

    Attributes:
        quant_state: None until quantized.
        bnb_quantized: Whether the data are packed codes.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    module: Any
    bnb_quantized: bool

    if TYPE_CHECKING:

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: Any = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        if data is None:
            data = torch.empty(0)
        if bnb_quantized and quant_state is not None and _is_plain(data, quant_state):
            # Some callers pass an old parameter's settings on with new, unquantized values.
            bnb_quantized, quant_state = False, None
        self = torch.Tensor._make_subclass(cls, data, requires_grad)  # pyright: ignore[reportPrivateUsage]
        self.blocksize = blocks.DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        for name, value in kwargs.items():
            setattr(self, name, value)
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | int = "cuda",
        module: Any = None,
        **kwargs: Any,
    ) -> Params4bit:
        """A parameter from packed codes and their serialized state (keys bare or with a dotted prefix).

        Raises:
            CheckpointError: The state is damaged, or of another shape than ``module``.
            ArgumentError: It belongs to other codes than ``data``.
        """
        state = QuantState.from_dict(quantized_stats, device)
        if state.shape is not None:
            check_packed(data, math.prod(state.shape))
        owner = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if None not in owner and state.shape is not None and tuple(state.shape) != owner:
            raise CheckpointError(f"a 4-bit weight of shape {tuple(state.shape)}", expected=f"{owner}, as its layer")
        return cls._from_state(data.to(device), state, requires_grad, module, **kwargs)

    @classmethod
    def _from_state(
        cls, data: Tensor, state: QuantState, requires_grad: bool, module: Any, **kwargs: Any
    ) -> Params4bit:
        self = cls(
            data,
            requires_grad,
            state,
            state.blocksize,
            state.nested,
            state.quant_type or "fp4",
            data.dtype,
            module,
            True,
            **kwargs,
        )
        if module is not None:
            module.quant_state = state
        return self

    def _quantize(self, device: torch.device | str | int) -> Params4bit:
        """Quantize in place on ``device``. Returns itself.

        Raises:
            ArgumentError: A weight that is no float, holds NaN or inf, or wants gradients. It stays as it was.
        """
        if self.requires_grad and not self.quant_storage.is_floating_point:
            raise ArgumentError(
                "a weight with requires_grad=True cannot become codes",
                expected="requires_grad=False: 4-bit weights are frozen",
                hint="call requires_grad_(False) on it before it is moved, and train adapters beside it",
            )
        weight = self.data.contiguous().to(device)
        packed, state = quantize_4bit(
            weight,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        scales = state.absmax if state.offset is None else state.offset
        if not bool(torch.isfinite(scales).all()):
            bad = int((~torch.isfinite(weight)).sum())
            if not bad:
                raise ArgumentError(
                    f"the mean scale of a weight of shape {tuple(weight.shape)} overflows float32",
                    expected="smaller values",
                    hint="use compress_statistics=False, or divide the weight by a constant",
                )
            raise ArgumentError(
                f"a weight of shape {tuple(weight.shape)} holds {bad} NaN or inf values",
                expected="finite values",
                hint="the checkpoint is damaged, or overflowed when it was cast to float16: load it in bfloat16",
            )
        self.data = packed
        self._adopt(state)
        self.bnb_quantized = True
        return self

    def _adopt(self, state: QuantState) -> None:
        self.quant_state = state
        if self.module is not None:
            self.module.quant_state = state

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move. The first move to a real device quantizes, in place; packed codes never change their dtype."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        if not self.bnb_quantized:
            if device is not None and device.type != "meta" and self.data.device.type != "meta":
                return self._quantize(device)
            return self._like(super().to(*args, **kwargs), None)
        if device is None and dtype is not None:
            return self
        state, data = self.quant_state, self.data
        moved = data.to(device=device, non_blocking=non_blocking)
        if moved is data and not kwargs.get("copy") and _is_on(state, moved.device):
            # As torch does; a new parameter would lose its owner, whose quant_state then goes stale.
            return self
        # On meta only the codes are given up: whoever brings them back finds the state where it was.
        if state is not None and device is not None and device.type != "meta":
            state = state.copy_to(device)
        return self._like(moved, state)

    def adopted(self, applied: Tensor) -> Params4bit:
        """The parameter after ``Module._apply`` turned it into ``applied``: itself wherever torch allows."""
        if applied is self:
            return self
        state = self.quant_state
        elsewhere = state is not None and any(tensor.device != applied.device for tensor in state.tensors())
        if state is not None and elsewhere and applied.device.type != "meta":
            state = state.copy_to(applied.device)
        if "meta" in {applied.device.type, self.device.type} and applied.device != self.device:
            return self._like(applied.data, state)
        self.data = applied.data
        self.quant_state = state
        return self

    def takes(self, other: Params4bit) -> bool:
        """Become ``other`` but for the owner: layers that share this parameter still do. False where torch forbids."""
        if "meta" in {self.device.type, other.device.type} or self.requires_grad:
            return False
        self.data = other.data
        vars(self).update({name: value for name, value in vars(other).items() if name != "module"})
        return True

    def _like(self, data: Tensor, state: QuantState | None) -> Params4bit:
        """A parameter of the same settings, without the owner, around other data."""
        # accelerate and peft write requires_grad into the dictionary as well.
        settings: dict[str, Any] = {**vars(self), "requires_grad": self.requires_grad}
        settings |= {"quant_state": state, "module": None}
        return Params4bit(data, **settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data": self.data, "requires_grad": self.requires_grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.requires_grad = state.pop("requires_grad")
        self.data = state.pop("data")
        vars(self).update(state)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # torch would rebuild a plain Parameter. The owner may point back here, so it travels as state, not as argument.
        return _rebuild, (self.data, self.requires_grad), dict(self.__dict__), None, None, _restore

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        if id(self) in memo:
            return memo[id(self)]
        twin = self._like(self.data.clone(memory_format=torch.preserve_format), None)
        memo[id(self)] = twin
        twin.quant_state = copy.deepcopy(self.quant_state, memo)
        # Within a copied layer the memo holds the new owner; alone, the copy keeps the old one.
        twin.module = memo.get(id(self.module), self.module)
        return twin

    def __copy__(self) -> Params4bit:
        twin = self._like(self.data, self.quant_state)
        twin.module = self.module
        return twin

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            result = func(*args, **kwargs)
        if func in _SPLITS and isinstance(args[0], Params4bit):
            # FSDP splits parameters and expects parameters of the same kind back.
            return tuple(args[0]._like(piece, args[0].quant_state) for piece in result)
        return result

    @property
    def _state(self) -> QuantState:
        if self.quant_state is None:
            raise AttributeError("not quantized yet: Params4bit has its quant_state after its first move to a device")
        return self.quant_state

    @property
    def _state2(self) -> QuantState:
        if self._state.state2 is None:
            raise AttributeError("the weight's absmax is not double-quantized")
        return self._state.state2

    # FSDP finds the tensors of a state dict by walking attributes under their serialized names.
    absmax = property(lambda self: self._state.absmax, doc="Scales, as in the quant_state.")
    code = property(lambda self: self._state.code, doc="Levels, as in the quant_state.")
    quant_map = property(lambda self: self._state.code, doc="Levels, under their serialized name.")
    offset = property(lambda self: self._state.offset, doc="Mean of absmax under double quantization.")
    state2 = property(lambda self: self._state.state2, doc="QuantState of absmax under double quantization.")
    nested_absmax = property(lambda self: self._state2.absmax, doc="Second-level scales.")
    nested_blocksize = property(lambda self: self._state2.blocksize, doc="Second-level blocksize.")
    nested_quant_map = property(lambda self: self._state2.code, doc="Second-level code map.")
    nested_dtype = property(lambda self: self._state2.dtype, doc="Second-level dtype.")
    nested_offset = property(lambda self: self._state.offset, doc="Mean of absmax, under its serialized name.")


def _is_on(state: QuantState | None, device: torch.device) -> bool:
    return state is None or all(tensor.device == device for tensor in state.tensors())


def _is_plain(data: Tensor, state: QuantState) -> bool:
    """Whether ``data`` has the shape of the weight itself, not of its packed codes."""
    if state.shape is None or not data.is_floating_point() or data.shape != torch.Size(state.shape):
        return False
    return data.numel() * data.element_size() != blocks.packed_bytes(data.numel())


def _rebuild(data: Tensor, requires_grad: bool) -> Params4bit:
    return Params4bit(data, requires_grad=requires_grad)


def _restore(parameter: Params4bit, attributes: dict[str, Any]) -> None:
    vars(parameter).update(attributes)
