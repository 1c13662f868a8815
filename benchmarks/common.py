"""What every benchmark shares: facts of the machine, interleaved timing, weights that leave the caches, CSV files."""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RESULTS", "Timing", "copies_for", "facts", "interleave", "write_csv"]

RESULTS = Path(__file__).parent / "results"
COLD_BYTES = 200 << 20
"""Weights rotate over at least this much memory, so that they come from memory as in a model, not from a cache."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: least and median of ``count`` calls."""

    least: float
    median: float
    count: int


def interleave(
    cases: Mapping[str, Callable[[int], object]],
    *,
    repeats: int = 30,
    seconds: float = 4.0,
    clock: Callable[[], float] = time.perf_counter,
    finish: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time all cases in turn, round by round, so that a disturbance of the machine falls on all of them.

    Args:
        cases: Name -> function of the round's number (for rotating over copies of a weight).
        repeats: Rounds at most.
        seconds: No further round once this has passed; three rounds are always made.
        clock: Seconds.
        finish: Called after each call within its time (a device synchronisation, say).
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case(0)
        finish()
    begin = time.perf_counter()
    for number in range(repeats):
        for name, case in cases.items():
            start = clock()
            case(number)
            finish()
            taken[name].append(clock() - start)
        if number >= 2 and time.perf_counter() - begin > seconds:
            break
    return {name: Timing(min(t), sorted(t)[len(t) // 2], len(t)) for name, t in taken.items()}


def copies_for(nbytes: int) -> int:
    """How many copies of a weight of that size to rotate over."""
    return max(2, -(-COLD_BYTES // max(1, nbytes)))


@functools.lru_cache(maxsize=1)
def facts() -> dict[str, str]:
    """Machine, versions and commit, as columns of every result."""
    return {
        "machine": _cpu(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numba", "llvmlite", "triton", "bitsandbytes")},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_csv(name: str, rows: Iterable[Mapping[str, object]], folder: Path = RESULTS) -> Path:
    """Write ``rows`` with the facts beside each to ``folder/name``; the columns are those of the first row."""
    known = facts()
    table = [{**row, **known} for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    stated = os.environ.get("BENCHMARK_COMMIT", "")  # where the checkout travels without its history
    if stated:
        return stated
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()
