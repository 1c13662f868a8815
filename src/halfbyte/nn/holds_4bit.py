"""What every module with a 4-bit weight does alike: moving, copying, saving and loading that weight with its scales."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.nn.holds import Holds
from halfbyte.nn.params import Params4bit
from halfbyte.ops.arguments import check_packed, check_storage_dtype
from halfbyte.quant_state import QuantState

__all__ = ["Holds4bit", "HoldsParams4bit", "loadable", "pop_stats"]


class HoldsParams4bit(Holds):
    """Base of modules whose parameters of :meth:`held_names` are Params4bit."""

    def _moves_itself(self, parameter: Any) -> bool:
        return isinstance(parameter, Params4bit)

    def _take(self, name: str, loaded: Params4bit, assign: bool) -> None:
        own = getattr(self, name)
        if assign or not isinstance(own, Params4bit) or not own.takes(loaded):
            setattr(self, name, loaded)
        self._remember(name)


class Holds4bit(HoldsParams4bit):
    """Base of modules whose ``weight`` is a Params4bit; stands before torch's own class."""

    weight: Any  # a Params4bit; sharding wrappers put their own parameters here
    quant_state: QuantState | None

    def weight_shape(self) -> tuple[int, int]:
        """Shape of the weight before it was quantized."""
        raise NotImplementedError

    def _check_others(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Refuse a state dict whose other entries do not fit.

        Raises:
            CheckpointError: One does not.
        """
        del state_dict, prefix

    def _remember(self, name: str) -> None:
        own = getattr(self, name)
        own.module = self
        self.quant_state = own.quant_state

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
        if state is None and _is_sharded(self.weight):
            state = self._lend_state()
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _lend_state(self) -> QuantState | None:
        """Give a sharded weight the attributes by which torch's checkpoint functions look its keys up."""
        state = self.quant_state
        if state is not None:
            self.weight.quant_state = state
            for key, value in state.as_dict(packed=True).items():
                if "." not in key:
                    setattr(self.weight, key, value)
        return state

    def _loadable(self, name: str, state_dict: dict[str, Any], prefix: str, assign: bool) -> Params4bit | None:
        stats, weight = pop_stats(state_dict, f"{prefix}{name}")
        made = None
        if weight is not None and _is_sharded(self.weight):
            self._take_scales(stats)
        elif weight is not None:
            made = loadable(self.weight, self.weight_shape(), weight, stats, assign)
        self._check_others(state_dict, prefix)
        return made

    def _take_scales(self, stats: dict[str, Any]) -> None:
        """Scales for a sharded weight; torch copies the shards of the codes themselves."""
        if not stats:
            return
        state = QuantState.from_dict(stats, self.weight.device)
        if state.shape != torch.Size(self.weight_shape()):
            raise CheckpointError(
                f"a 4-bit weight of shape {tuple(state.shape or ())}", expected=f"{self.weight_shape()}"
            )
        self.quant_state = copy.deepcopy(state)


def _is_sharded(weight: Any) -> bool:
    """Whether ``fully_shard`` has put a DTensor in the weight's place."""
    return hasattr(weight, "device_mesh")


def pop_stats(state_dict: dict[str, Any], key: str) -> tuple[dict[str, Any], Any]:
    """The keys that describe the parameter ``key``, taken out of ``state_dict``, and the parameter, which stays.

    Raises:
        CheckpointError: They are there, and the parameter is not.
    """
    stats = {each: state_dict.pop(each) for each in list(state_dict) if each.startswith(f"{key}.")}
    parameter = state_dict.get(key)
    if stats and parameter is None:
        raise CheckpointError(f"{key}.* without {key}", expected="both")
    return stats, parameter


def loadable(
    own: Any, shape: tuple[int, ...], weight: Tensor, stats: dict[str, Any], assign: bool
) -> Params4bit | None:
    """The parameter that a state dict's weight becomes; None where torch can copy it as it is.

    Args:
        own: The Params4bit that is there.
        shape: Its shape before it was quantized.
        weight: Packed codes or plain values.
        stats: The keys that describe the codes, if any.
        assign: Whether the state dict's own tensors are taken.

    Raises:
        CheckpointError: They do not fit, or are damaged.
    """
    device = weight.device if assign or own.device.type == "meta" else own.device
    if stats:
        state = QuantState.from_dict(stats, device)
        if state.shape != torch.Size(shape):
            raise CheckpointError(f"a 4-bit weight of shape {tuple(state.shape or ())}", expected=f"{shape}")
        check_storage_dtype(weight.dtype)
        check_packed(weight, math.prod(shape))
        data = weight.detach().to(device)
        if not assign:  # the layer must not change with the caller's dictionary
            state, data = copy.deepcopy(state), data.clone()
        return Params4bit._from_state(data, state, False, None)  # pyright: ignore[reportPrivateUsage]
    if weight.shape == shape and weight.is_floating_point():
        if not own.bnb_quantized:
            return None
        settings: dict[str, Any] = {
            **vars(own),
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
