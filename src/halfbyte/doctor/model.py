"""The words of a report: status, layer, level, fix, measurement, result. Plain data that looks at no machine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Fix", "Layer", "Level", "Measurement", "Result", "Status"]


class Status(str, Enum):
    """What a check found.

    ``BLOCKED`` is "not reached": a check it depends on failed first, so that one is the cause to look at.
    """

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"
    CRASH = "crash"
    BLOCKED = "blocked"


class Layer(str, Enum):
    """Part of the stack, lowest first: the first broken one is the root cause. The value is a code's prefix."""

    PY = "PY"
    GPU = "GPU"
    ENV = "ENV"
    TORCH = "TORCH"
    TRITON = "TRITON"
    CPU = "CPU"
    NUM = "NUM"
    SPEED = "SPEED"
    HF = "HF"
    MEM = "MEM"

    @property
    def heading(self) -> str:
        """What its section of the report is called."""
        return _HEADINGS[self]


_HEADINGS = {
    Layer.PY: "Python and packages",
    Layer.GPU: "GPU and driver",
    Layer.ENV: "Environment variables and libraries",
    Layer.TORCH: "PyTorch",
    Layer.TRITON: "Triton tool chain",
    Layer.CPU: "CPU and numba",
    Layer.NUM: "Numerics",
    Layer.SPEED: "Speed",
    Layer.HF: "Hugging Face stack and bitsandbytes",
    Layer.MEM: "Memory and disk",
}


class Level(str, Enum):
    """How deep a run goes: reading files only, computing on every device, or timing as well."""

    QUICK = "quick"
    DEFAULT = "default"
    FULL = "full"

    def includes(self, other: Level) -> bool:
        """Whether a run at this level has the checks of ``other``.

        >>> Level.DEFAULT.includes(Level.QUICK), Level.QUICK.includes(Level.FULL)
        (True, False)
        """
        order = list(Level)
        return order.index(other) <= order.index(self)


@dataclass(frozen=True)
class Fix:
    """One way out.

    Attributes:
        title: What it does, in a few words.
        command: What to type, one or more lines.
        safe: Reversible and within the user's own files. Only those may ``--fix`` carry out.
    """

    title: str
    command: str
    safe: bool = False


@dataclass(frozen=True)
class Measurement:
    """A number against its limit.

    Attributes:
        device: ``"cpu"``, ``"cuda:0"``, ...
        name: What was measured.
        value: The number.
        limit: The largest acceptable value; for ``at_least`` the smallest. None where it is only reported.
        unit: Of value and limit; empty for a ratio or relative error.
        at_least: The limit is a lower one.
    """

    device: str
    name: str
    value: float
    limit: float | None = None
    unit: str = ""
    at_least: bool = False

    @property
    def ok(self) -> bool:
        """Whether the value keeps to the limit; a NaN never does.

        >>> Measurement("cpu", "error", 2e-7, 1e-6).ok, Measurement("cpu", "error", float("nan"), 1e-6).ok
        (True, False)
        """
        if self.limit is None:
            return self.value == self.value
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Result:
    """What one check says.

    Attributes:
        status: The outcome.
        summary: One sentence without a full stop.
        evidence: The facts it rests on, one a line.
        fixes: Ways out, best first.
        measurements: Numbers, each against its limit.
        classes: Failure classes ("A2") this finding belongs to; empty for a pass.
        blocking: A warning after which what requires this check is not reached.
    """

    status: Status
    summary: str
    evidence: tuple[str, ...] = ()
    fixes: tuple[Fix, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    classes: tuple[str, ...] = ()
    blocking: bool = False

    @classmethod
    def passed(cls, summary: str, *evidence: str, measurements: tuple[Measurement, ...] = ()) -> Result:
        """All is well."""
        return cls(Status.PASS, summary, evidence, measurements=measurements)

    @classmethod
    def skipped(cls, summary: str) -> Result:
        """Does not apply here; the summary says why."""
        return cls(Status.SKIP, summary)

    @classmethod
    def warned(
        cls,
        summary: str,
        *evidence: str,
        fixes: tuple[Fix, ...] = (),
        classes: tuple[str, ...] = (),
        blocking: bool = False,
    ) -> Result:
        """Works, with a limit."""
        return cls(Status.WARN, summary, evidence, fixes, classes=classes, blocking=blocking)

    @classmethod
    def failed(cls, summary: str, *evidence: str, fixes: tuple[Fix, ...] = (), classes: tuple[str, ...] = ()) -> Result:
        """Broken."""
        return cls(Status.FAIL, summary, evidence, fixes, classes=classes)
