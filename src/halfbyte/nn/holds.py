"""What every module with quantized parameters does alike: taking them through moves, and out of state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError

__all__ = ["Holds"]


class Holds(torch.nn.Module):
    """Base of modules with parameters that bring scales along; stands before torch's own class."""

    def held_names(self) -> tuple[str, ...]:
        """Names of those parameters."""
        return ("weight",)

    def _moves_itself(self, parameter: Any) -> bool:
        """Whether torch must leave the move of ``parameter`` to its ``adopted``."""
        raise NotImplementedError

    def _loadable(self, name: str, state_dict: dict[str, Any], prefix: str, assign: bool) -> Any:
        """The parameter that the state dict's entries for ``name`` become; None where torch can copy them.

        What describes the parameter is taken out of ``state_dict``, the parameter itself is not.

        Raises:
            HalfbyteError: They do not fit, or are damaged.
        """
        raise NotImplementedError

    def _take(self, name: str, loaded: Any, assign: bool) -> None:
        """Put a parameter that was loaded in its place."""
        raise NotImplementedError

    def _remember(self, name: str) -> None:
        """Note what the module keeps of a parameter that was moved."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # torch would copy the data into the old parameters but leave their scales where they were.
        found = {name: self._parameters.get(name) for name in self.held_names()}
        own: dict[str, Any] = {name: parameter for name, parameter in found.items() if self._moves_itself(parameter)}
        for name in own:
            self._parameters[name] = None
        try:
            super()._apply(fn, recurse)
            self._parameters.update({name: parameter.adopted(fn(parameter)) for name, parameter in own.items()})
        except BaseException:
            self._parameters.update(own)
            raise
        for name in own:
            self._remember(name)
        return self

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
        """Takes codes with what describes them, or plain values; whatever the module holds now."""
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        loaded: dict[str, Any] = {}
        for name in self.held_names():
            try:
                made = self._loadable(name, state_dict, prefix, assign)
            except HalfbyteError as error:
                error_msgs.append(f"{prefix}{name}: {error}")
                # Nothing else of the layer must change either.
                for own in self._parameters:
                    state_dict.pop(prefix + own, None)
                return
            if made is not None:
                loaded[name] = made
        for name in loaded:
            del state_dict[prefix + name]
        shown: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, shown, unexpected_keys, error_msgs)
        missing_keys += [key for key in shown if key.removeprefix(prefix) not in loaded]
        for name, parameter in loaded.items():
            self._take(name, parameter, assign)
