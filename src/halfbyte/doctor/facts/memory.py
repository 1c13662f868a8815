"""Main memory, its container limit, shared memory and the disk that models are downloaded to; in bytes."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from halfbyte.doctor.facts.toolchain import NOWHERE, Folder, folder_state
from halfbyte.doctor.host import Host
from halfbyte.doctor.registry import fact

__all__ = ["Memory", "memory"]


@dataclass(frozen=True)
class Memory:
    """Memory and disk in bytes; 0 where not known.

    Attributes:
        total: Of the machine.
        available: Without swapping, now.
        limit: Of the container; 0 for none.
        shared: Size of ``/dev/shm``, through which data loader workers pass batches.
        models: Folder of downloaded models and the space left in it.
        temporary: Folder of temporary files.
    """

    total: int = 0
    available: int = 0
    limit: int = 0
    shared: int = 0
    models: Folder = NOWHERE
    temporary: Folder = NOWHERE

    @property
    def usable(self) -> int:
        """What a model could take: the least of what is available and the container's limit."""
        known = [size for size in (self.available, self.limit) if size]
        return min(known, default=0)


@fact
def memory(host: Host) -> Memory:
    """Memory and disk."""
    text = host.read("/proc/meminfo")
    return Memory(
        total=_kib(text, "MemTotal"),
        available=_kib(text, "MemAvailable"),
        limit=_limit(host, _kib(text, "MemTotal")),
        shared=_size(host.path("/dev/shm")),
        models=folder_state(_models(host)),
        temporary=folder_state(Path(host.environ.get("TMPDIR") or ("/tmp" if os.name == "posix" else host.home))),
    )


def _kib(text: str, name: str) -> int:
    match = re.search(rf"^{name}:\s*(\d+) kB", text, flags=re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def _limit(host: Host, total: int) -> int:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = host.read(path).strip()
        if text.isdigit() and (not total or int(text) < total):
            return int(text)
    return 0


def _size(path: Path) -> int:
    try:
        return shutil.disk_usage(path).total
    except OSError:
        return 0


def _models(host: Host) -> Path:
    for name, inside in (("HF_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if host.environ.get(name):
            return Path(host.environ[name]) / inside
    return Path(host.environ.get("XDG_CACHE_HOME") or host.home / ".cache") / "huggingface" / "hub"
