"""The CPU: instruction sets, cores that may be used, numba."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from halfbyte.doctor.facts.packages import Packages
from halfbyte.doctor.host import Host
from halfbyte.doctor.registry import fact

__all__ = ["Cpu", "cpu"]

_INTERESTING = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve", "bf16", "i8mm")


@dataclass(frozen=True)
class Cpu:
    """The CPU.

    Attributes:
        name: Marketing name; empty where not known.
        features: Instruction sets that matter for quantized arithmetic.
        cores: Logical cores of the machine.
        usable: Those this process may run on.
        quota: Cores that the container may use at once; 0.0 for no limit.
        numba: Installed version; empty for none.
        numba_requires_numpy: Its condition on NumPy, ``"numpy<2.4,>=1.22"``.
        numpy: Installed version; empty for none.
    """

    name: str = ""
    features: tuple[str, ...] = ()
    cores: int = 1
    usable: int = 1
    quota: float = 0.0
    numba: str = ""
    numba_requires_numpy: str = ""
    numpy: str = ""


@fact
def cpu(host: Host, packages: Packages) -> Cpu:
    """The CPU and what numba may do with it."""
    text = host.read("/proc/cpuinfo")
    flags = set(_first(r"^(?:flags|Features)\s*:\s*(.*)$", text).split())
    numba = packages.get("numba")
    return Cpu(
        name=_first(r"^model name\s*:\s*(.*)$", text),
        features=tuple(name for name in _INTERESTING if name in flags),
        cores=os.cpu_count() or 1,
        usable=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        quota=_quota(host),
        numba=numba.version if numba else "",
        numba_requires_numpy=next((line for line in (numba.requires if numba else ()) if line.startswith("numpy")), ""),
        numpy=packages.version("numpy"),
    )


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text, flags=re.MULTILINE)
    return match.group(1).strip() if match else ""


def _quota(host: Host) -> float:
    words = host.read("/sys/fs/cgroup/cpu.max").split()
    if len(words) == 2 and words[0].isdigit():
        return int(words[0]) / int(words[1])
    quota = host.read(str(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))).strip()
    period = host.read("/sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else 0.0
