"""Which CPU level this process uses: the best that the machine runs, or what HALFBYTE_CPU_FEATURES caps it to."""

from __future__ import annotations

import functools
import platform

import llvmlite.binding as llvm

from halfbyte import _env
from halfbyte.backends.cpu.kernels.levels import LEVELS, Level
from halfbyte.errors import ArgumentError

__all__ = ["level", "level_named", "levels", "machine", "multiplies_bf16"]


def machine() -> str:
    """The machine as LLVM calls it: ``x86_64``, ``aarch64``."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


@functools.lru_cache(maxsize=1)
def _features() -> frozenset[str]:
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


@functools.lru_cache(maxsize=1)
def levels() -> tuple[Level, ...]:
    """All levels that this machine runs, best first; the last is ``portable``."""
    return tuple(found for found in LEVELS if found.machine in {"", machine()} and found.needs <= _features())


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


def _dot_pays() -> bool:
    """Whether sums of bf16 products are faster than fp32 ones: measured so on Zen 4, and not on Sapphire Rapids."""
    return llvm.get_host_cpu_name().startswith("znver")


def multiplies_bf16() -> bool:
    """Whether torch's large products of bf16 run on instructions of their own under the level in use."""
    return level().lanes == 16 and not _features().isdisjoint({"avx512bf16", "amx-bf16"})


@functools.lru_cache(maxsize=1)
def level() -> Level:
    """The level in use. Read once: HALFBYTE_CPU_FEATURES must be set before the first op.

    Raises:
        ArgumentError: HALFBYTE_CPU_FEATURES names no level.
    """
    cap = str(_env.get("HALFBYTE_CPU_FEATURES"))
    if not cap:
        return next(found for found in levels() if not found.dot_bf16 or _dot_pays())
    wanted = LEVELS.index(level_named(cap))
    return next(found for found in levels() if LEVELS.index(found) >= wanted)
