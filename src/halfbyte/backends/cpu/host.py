"""Which CPU level this process uses: the best that the machine runs, or what HALFBYTE_CPU_FEATURES caps it to."""

from __future__ import annotations

import functools
import platform

import llvmlite.binding as llvm

from halfbyte import _env
from halfbyte.backends.cpu.kernels.levels import LEVELS, Level
from halfbyte.errors import ArgumentError

__all__ = ["level", "level_named", "levels", "machine"]


def machine() -> str:
    """The machine as LLVM calls it: ``x86_64``, ``aarch64``."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


@functools.lru_cache(maxsize=1)
def levels() -> tuple[Level, ...]:
    """All levels that this machine runs, best first; the last is ``portable``."""
    features = {name for name, present in llvm.get_host_cpu_features().items() if present}
    return tuple(found for found in LEVELS if found.machine in {"", machine()} and found.needs <= features)


def level_named(name: str) -> Level:
    """The level of that name, whether or not this machine runs it.

    Raises:
        ArgumentError: No such level.

    >>> level_named("avx2").lanes
    8
    """
    for found in LEVELS:
        if found.name == name:
            return found
    raise ArgumentError(f"CPU level {name!r} is unknown", expected=f"one of {', '.join(one.name for one in LEVELS)}")


@functools.lru_cache(maxsize=1)
def level() -> Level:
    """The level in use. Read once: HALFBYTE_CPU_FEATURES must be set before the first op.

    Raises:
        ArgumentError: HALFBYTE_CPU_FEATURES names no level.
    """
    cap = str(_env.get("HALFBYTE_CPU_FEATURES"))
    if not cap:
        return levels()[0]
    wanted = LEVELS.index(level_named(cap))
    return next(found for found in levels() if LEVELS.index(found) >= wanted)
