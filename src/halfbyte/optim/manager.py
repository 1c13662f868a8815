"""Settings for single parameters, kept for all optimizers of the process: which weight stays in 32 bits, say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError

__all__ = ["GlobalOptimManager", "MockArgs"]


class MockArgs:
    """An object with the items of a dict as attributes.

    >>> MockArgs({"optim_bits": 8}).optim_bits
    8
    """

    def __init__(self, initial_data: Mapping[str, Any]) -> None:
        self.__dict__.update(initial_data)


class GlobalOptimManager:
    """Overrides of optimizer settings by parameter. There is one: :meth:`get_instance`.

    >>> manager, weight = GlobalOptimManager.get_instance(), torch.nn.Parameter(torch.zeros(8192))
    >>> manager.override_config(weight, "optim_bits", 32)
    >>> manager.override_of(weight)
    {'optim_bits': 32}
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        """Forget every override."""
        self.changes = getattr(self, "changes", 0) + 1
        self.pid2config: dict[int, dict[str, Any]] = {}
        self.index2config: dict[tuple[int, int], dict[str, Any]] = {}
        self.optimizer: Any = None
        self.uses_config_override = False
        self.module_weight_config_triple: list[tuple[torch.nn.Module, str, dict[str, Any]]] = []
        self._alive: dict[int, Tensor] = {}

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The one manager of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Kept for bitsandbytes' recipes: overrides are found by parameter, whether or not it was registered.

        Args:
            params: Parameters or parameter groups.
        """
        groups = list(params)
        if not groups or not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group_index, group in enumerate(groups):
            for index, p in enumerate(group["params"]):
                if id(p) in self.pid2config:
                    self.index2config[(group_index, index)] = self.pid2config[id(p)]

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        """Set ``key`` to ``value``, or all of ``key_value_dict``, for these parameters.

        Args:
            parameters: One or several.
            key: ``lr``, ``betas``, ``eps``, ``weight_decay``, ``optim_bits``, ``min_8bit_size``, ``max_unorm`` or
                ``skip_zeros``.
            value: Its value.
            key_value_dict: Several keys with their values.

        Raises:
            ArgumentError: Both a key and a dict.
        """
        self.uses_config_override = True
        self.changes += 1
        chosen = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if key is not None and value is not None:
            if key_value_dict is not None:
                raise ArgumentError(f"override_config got key={key!r} and a key_value_dict", expected="one of them")
            key_value_dict = {key: value}
        if key_value_dict is None:
            return
        for p in chosen:
            self.pid2config.setdefault(id(p), {}).update(key_value_dict)
            self._alive[id(p)] = p  # an id means one tensor only while that tensor lives

    def register_module_override(self, module: torch.nn.Module, param_name: str, config: dict[str, Any]) -> None:
        """Settings for a module's parameter, looked up when an optimizer takes its first step."""
        self.module_weight_config_triple.append((module, param_name, config))

    def override_of(self, parameter: Tensor) -> dict[str, Any]:
        """The settings that hold for this parameter instead of its optimizer's."""
        return self.pid2config.get(id(parameter), {})
