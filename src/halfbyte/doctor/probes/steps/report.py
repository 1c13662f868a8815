"""What a step returns: numbers against limits, notes; or a reason why it does not apply."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Report", "Skip", "Step"]


class Skip(Exception):  # noqa: N818  not an error: the step does not apply, and this says why
    """The step does not apply here; the text says why."""


@dataclass
class Report:
    """Numbers and remarks of one step on one device."""

    measurements: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    notes: list[str] = field(default_factory=list[str])

    def measure(
        self, name: str, value: float, limit: float | None = None, *, unit: str = "", at_least: bool = False
    ) -> None:
        """Add a number; see :class:`halfbyte.doctor.model.Measurement`."""
        self.measurements.append(
            {"name": name, "value": float(value), "limit": limit, "unit": unit, "at_least": at_least}
        )


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        module: Module of this package that has it.
        function: Its name there; takes the device and whether to be thorough.
        basic: Those after it do not run when it fails.
        full: It only runs at the full level.
        apart: It has a child of its own, beside the others: what it imports takes seconds (torch's optimizers import
            torch's compiler).
    """

    module: str
    function: str
    basic: bool = False
    full: bool = False
    apart: bool = False

    def run(self, device: str, thorough: bool) -> Report:
        """Import and run it."""
        module = importlib.import_module(f"{__package__}.{self.module}")
        function: Callable[[str, bool], Report] = getattr(module, self.function)
        return function(device, thorough)
