"""Which torch, CUDA, driver, GPU and bitsandbytes versions belong together: questions to ``versions.json``.

Standard library only, so that it answers on a machine where nothing else imports. Versions are text ("13.0"); an
architecture is a pair of integers, (7, 5) for sm_75. Where the table does not know, the answer is None or empty,
never a guess.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

__all__ = [
    "PYTORCH_INDEX",
    "Wheel",
    "arches",
    "bitsandbytes_binaries",
    "bitsandbytes_for",
    "bitsandbytes_pick",
    "cuda_for_driver",
    "cuda_from_number",
    "driver_needed",
    "driver_runs",
    "last_torch_for",
    "newest_torch_for",
    "number",
    "runs_on",
    "table_date",
    "torch_versions",
    "triton_for",
    "wheels_for",
]

Arch = tuple[int, int]

_TEGRA: frozenset[Arch] = frozenset({(5, 3), (6, 2), (7, 2), (8, 7)})

PYTORCH_INDEX = "https://download.pytorch.org/whl"
"""Where PyTorch keeps the wheels of every CUDA version; the package index has only one of them."""


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(files("halfbyte.doctor").joinpath("versions.json").read_text(encoding="utf-8"))


def table_date() -> str:
    """Day of the newest row, as ``"2026-11-24"``: what was released later is unknown here."""
    return max(row["checked"] for name, rows in _table().items() if name != "about" for row in rows)


def number(version: str, parts: int = 2) -> tuple[int, ...]:
    """First numbers of a version, with a missing one as 0; empty for text without a number.

    >>> number("2.13.0+cpu"), number("550.54.14", 3), number("13"), number("unknown")
    ((2, 13), (550, 54, 14), (13, 0), ())
    """
    found = [int(digits) for digits in re.findall(r"\d+", version.split("+")[0])[:parts]]
    return tuple(found + [0] * (parts - len(found))) if found else ()


def cuda_from_number(value: int) -> str:
    """CUDA version behind the number that the driver API and torch's messages use (1000 * major + 10 * minor).

    >>> cuda_from_number(12040), cuda_from_number(13000)
    ('12.4', '13.0')
    """
    return f"{value // 1000}.{value % 1000 // 10}"


def driver_needed(cuda: str) -> str | None:
    """Oldest driver branch that runs programs built for this CUDA version (minor version compatibility).

    >>> driver_needed("13.2"), driver_needed("12.6"), driver_needed("9.2")
    ('580', '525', None)
    """
    major = number(cuda)[:1]
    return next((row["driver"] for row in _table()["driver_floor"] if (row["cuda_major"],) == major), None)


def driver_runs(driver: str, cuda: str) -> bool | None:
    """Whether a driver runs programs built for a CUDA version; None where the table does not know.

    >>> driver_runs("550.54.14", "12.8"), driver_runs("550.54.14", "13.0"), driver_runs("550.54.14", "9.2")
    (True, False, None)
    """
    needed = driver_needed(cuda)
    return None if needed is None or not number(driver) else number(driver) >= number(needed)


def cuda_for_driver(driver: str) -> str | None:
    """Newest CUDA version that a driver knows itself, the one that ``nvidia-smi`` prints.

    Programs of a later minor version of the same major run too: ask :func:`driver_runs`.

    >>> cuda_for_driver("550.90.07"), cuda_for_driver("580.95.05"), cuda_for_driver("390.10")
    ('12.4', '13.0', None)
    """
    known = [row["cuda"] for row in _table()["driver_branch"] if number(row["driver"]) <= number(driver)]
    return max(known, key=number, default=None)


@dataclass(frozen=True)
class Wheel:
    """One build of torch.

    Attributes:
        torch: ``"2.14"``.
        cuda: ``"12.6"``.
        default: It is the one that the package index gives for Linux when no index is named.
    """

    torch: str
    cuda: str
    default: bool

    @property
    def tag(self) -> str:
        """Local version and name of the index folder: ``"cu126"``."""
        return "cu" + self.cuda.replace(".", "")

    @property
    def requirement(self) -> str:
        """For an installer: ``"torch==2.14.*"``."""
        return f"torch=={self.torch}.*"

    @property
    def index_url(self) -> str:
        """Index that has this build, whatever the platform's default is."""
        return f"{PYTORCH_INDEX}/{self.tag}"


def _torch_row(torch: str) -> dict[str, Any] | None:
    return next((row for row in _table()["torch"] if number(row["torch"]) == number(torch)), None)


def torch_versions() -> tuple[str, ...]:
    """Every torch release line of the table, oldest first.

    >>> torch_versions()[0]
    '2.8'
    """
    return tuple(row["torch"] for row in _table()["torch"])


def wheels_for(torch: str) -> tuple[Wheel, ...]:
    """CUDA builds that were published for a torch version, oldest CUDA first; empty for an unknown one.

    >>> [wheel.cuda for wheel in wheels_for("2.14.1")]
    ['12.6', '13.0', '13.2']
    """
    row = _torch_row(torch)
    if row is None:
        return ()
    return tuple(Wheel(row["torch"], cuda, cuda == row["pypi_cuda"]) for cuda in row["arches_x86_64"])


def arches(torch: str, cuda: str, machine: str = "x86_64") -> tuple[Arch, ...]:
    """GPU architectures that a build has code for; empty where unknown.

    >>> arches("2.14", "12.6")
    ((5, 0), (6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0))
    """
    row = _torch_row(torch) or {}
    key = "arches_aarch64" if machine.lower() in {"aarch64", "arm64"} else "arches_x86_64"
    named: list[str] = row.get(key, {}).get(".".join(str(n) for n in number(cuda)), [])
    return tuple((int(a.split(".")[0]), int(a.split(".")[1])) for a in named)


def runs_on(built: Sequence[Arch], capability: Arch) -> bool:
    """Whether compiled code for ``built`` runs on a GPU: same major version, minor not newer than the GPU's.

    Jetson's GPUs need code made for them; so says torch's own table in ``torch/cuda/__init__.py``. Code that the driver
    could compile from PTX is not counted, since not every wheel carries it.

    >>> runs_on([(8, 0), (12, 0)], (8, 9)), runs_on([(8, 0), (12, 0)], (9, 0)), runs_on([(12, 0)], (12, 1))
    (True, False, True)
    """
    if capability in _TEGRA:
        return capability in built
    return any(major == capability[0] and minor <= capability[1] for major, minor in built)


def newest_torch_for(
    *,
    driver: str | None = None,
    capability: Arch | None = None,
    python: tuple[int, int] | None = None,
    machine: str = "x86_64",
    cuda_major: int | None = None,
) -> Wheel | None:
    """Newest torch build that a driver, a GPU and a Python can use; what is None puts no condition.

    Of several CUDA versions of that release the package index's default is preferred, then the newest.

    >>> newest_torch_for(driver="550.54.14", capability=(8, 6))
    Wheel(torch='2.14', cuda='12.6', default=False)
    >>> newest_torch_for(driver="450.80.02") is None
    True
    """
    for row in reversed(_table()["torch"]):
        if python is not None and python < number(row["python"]):
            continue
        fitting = [
            wheel
            for wheel in wheels_for(row["torch"])
            if (driver is None or driver_runs(driver, wheel.cuda))
            and (capability is None or runs_on(arches(wheel.torch, wheel.cuda, machine), capability))
            and (cuda_major is None or number(wheel.cuda)[0] == cuda_major)
        ]
        if fitting:
            return max(fitting, key=lambda wheel: (wheel.default, number(wheel.cuda)))
    return None


def last_torch_for(capability: Arch) -> str | None:
    """Last torch release line with a build for a GPU, or None where the newest one still has it.

    >>> last_torch_for((6, 0)), last_torch_for((9, 0))
    ('2.14', None)
    """
    newest = newest_torch_for(capability=capability)
    return None if newest is None or newest.torch == torch_versions()[-1] else newest.torch


def triton_for(torch: str) -> str | None:
    """Release line of triton that a torch version asks for.

    >>> triton_for("2.13.0"), triton_for("1.0")
    ('3.7', None)
    """
    row = _torch_row(torch)
    return row["triton"] if row else None


def _bitsandbytes_row(version: str) -> dict[str, Any] | None:
    older = [row for row in _table()["bitsandbytes"] if number(row["bitsandbytes"], 3) <= number(version, 3)]
    return older[-1] if older else None


def bitsandbytes_binaries(version: str) -> tuple[str, ...]:
    """CUDA versions that the Linux x86-64 wheel of a bitsandbytes version has binaries for; empty before 0.43.3.

    A version between two rows of the table has the binaries of the older one or more.

    >>> bitsandbytes_binaries("0.50.2")
    ('11.8', '12.1', '12.4', '12.6', '12.8', '13.0', '13.2')
    """
    row = _bitsandbytes_row(version)
    return tuple(row["cuda"]) if row else ()


def bitsandbytes_pick(available: Sequence[str], cuda: str, version: str) -> str | None:
    """Which of the binaries that are there a bitsandbytes version loads for torch's CUDA version, or None.

    Until 0.49 only the exact one; since 0.50 the next lower of the same major, else the next higher.

    >>> bitsandbytes_pick(["12.6", "12.8"], "12.9", "0.50.2"), bitsandbytes_pick(["12.8"], "12.9", "0.46.0")
    ('12.8', None)
    >>> bitsandbytes_pick(["12.8"], "13.0", "0.50.2") is None
    True
    """
    if cuda in available:
        return cuda
    row = _bitsandbytes_row(version)
    if row is None or not row["nearest"]:
        return None
    same_major = sorted((v for v in available if number(v)[:1] == number(cuda)[:1]), key=number)
    lower = [v for v in same_major if number(v) < number(cuda)]
    return lower[-1] if lower else next(iter(same_major), None)


def bitsandbytes_for(cuda: str) -> str | None:
    """Oldest bitsandbytes version of the table that loads a binary for a CUDA version, or None.

    >>> bitsandbytes_for("13.0"), bitsandbytes_for("13.4"), bitsandbytes_for("14.0")
    ('0.48.0', '0.50.0', None)
    """
    for row in _table()["bitsandbytes"]:
        if bitsandbytes_pick(row["cuda"], cuda, row["bitsandbytes"]):
            return row["bitsandbytes"]
    return None
