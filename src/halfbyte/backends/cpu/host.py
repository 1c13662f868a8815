"""Which CPU level this process uses: the best that the machine runs, or what HALFBYTE_CPU_FEATURES caps it to."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys

import llvmlite.binding as llvm

from halfbyte import _env
from halfbyte.backends.cpu.kernels.levels import LEVELS, Level
from halfbyte.errors import ArgumentError

__all__ = ["level", "level_named", "levels", "machine", "multiplies_bf16"]

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18
"""Linux on x86-64: the system call, its request for an extended register state, and the state of AMX tiles."""


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
    known = (found for found in LEVELS if found.machine in {"", machine()} and found.needs <= _features())
    return tuple(found for found in known if not found.matrix or _may_use_tiles())


@functools.lru_cache(maxsize=1)
def _may_use_tiles() -> bool:
    """Whether the system lets this process use AMX tiles: on Linux each process asks once, for all its threads."""
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None, use_errno=True).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


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
