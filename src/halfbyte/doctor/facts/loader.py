"""Environment variables that reports may show, and the shared libraries that loader variables put in front."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from halfbyte.doctor.facts.gpu import LIBRARY_FOLDERS
from halfbyte.doctor.host import Host
from halfbyte.doctor.privacy import allowed
from halfbyte.doctor.registry import fact

__all__ = ["GPU_MASKS", "Environment", "Loader", "Override", "environment", "loader"]

GPU_MASKS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Variables that choose, or hide, GPUs."""

_SENSITIVE = re.compile(
    r"(libcuda|libcudart|libnvJitLink|libcublas|libcublasLt|libcusparse|libcudnn|libnvrtc|libnccl|libstdc\+\+|libgomp"
    r"|libiomp5|libc10|libtorch\w*)\.so"
)


@dataclass(frozen=True)
class Override:
    """A folder of ``LD_LIBRARY_PATH`` and the libraries in it that torch would otherwise bring or find itself."""

    folder: str
    libraries: tuple[str, ...] = ()
    exists: bool = True


@dataclass(frozen=True)
class Loader:
    """What the dynamic loader would find.

    Attributes:
        overrides: Folders of ``LD_LIBRARY_PATH``, in order.
        preload: Entries of ``LD_PRELOAD``.
        compat: A CUDA compatibility folder that stands in front of the driver's own ``libcuda``; empty for none.
        ldconfig: ``/sbin/ldconfig`` is there.
        libcuda: Where ``libcuda.so.1`` is listed or lies; empty for nowhere.
        libcuda_listed: ``ldconfig -p`` lists it.
        glibc: ``"2.35"``; empty where it is not glibc or not known.
        glibcxx: Newest ``GLIBCXX_3.4.N`` of the system's libstdc++ as N; 0 where not known.
        runtimes: CUDA runtime libraries found outside torch's own: toolkits and conda.
    """

    overrides: tuple[Override, ...] = ()
    preload: tuple[str, ...] = ()
    compat: str = ""
    ldconfig: bool = True
    libcuda: str = ""
    libcuda_listed: bool = False
    glibc: str = ""
    glibcxx: int = 0
    runtimes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Environment:
    """Environment variables on the allow-list, by name."""

    shown: Mapping[str, str] = field(default_factory=dict[str, str])

    def get(self, name: str) -> str | None:
        """Value; None where it is not set."""
        return self.shown.get(name)


@fact
def environment(host: Host) -> Environment:
    """The variables that a report may show."""
    return Environment({name: host.environ[name] for name in sorted(host.environ) if allowed(name)})


@fact
def loader(host: Host) -> Loader:
    """What the dynamic loader would find."""
    if host.windows:
        return Loader(ldconfig=False)
    overrides = tuple(_override(part) for part in host.environ.get("LD_LIBRARY_PATH", "").split(":") if part)
    ldconfig = host.path("/sbin/ldconfig").exists()
    listed = _listed(host) if ldconfig else ""
    found = listed or next(
        (f"{folder}/libcuda.so.1" for folder in LIBRARY_FOLDERS if (host.path(folder) / "libcuda.so.1").exists()), ""
    )
    return Loader(
        overrides=overrides,
        preload=tuple(part for part in re.split(r"[:\s]+", host.environ.get("LD_PRELOAD", "")) if part),
        compat=next((each.folder for each in overrides if _is_compat(each)), ""),
        ldconfig=ldconfig,
        libcuda=found,
        libcuda_listed=bool(listed),
        glibc=_glibc(host),
        glibcxx=_glibcxx(host),
        runtimes=_runtimes(host),
    )


def _override(folder: str) -> Override:
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except OSError:
        return Override(folder, exists=False)
    return Override(folder, tuple(sorted(name for name in names if _SENSITIVE.match(name))))


def _is_compat(override: Override) -> bool:
    has_driver = any(name.startswith("libcuda.so") for name in override.libraries)
    return has_driver and "compat" in Path(override.folder).parts


def _listed(host: Host) -> str:
    program = host.path("/sbin/ldconfig")
    done = host.run([str(program), "-p"], 5.0)
    match = re.search(r"libcuda\.so\.1 .*=> (\S+)", done.output) if done.code == 0 else None
    return match.group(1) if match else ""


def _glibc(host: Host) -> str:
    if host.root != Path("/") or host.system != "Linux":
        return ""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").replace("glibc", "").strip()
    except (ValueError, OSError, AttributeError):  # musl knows no such name
        return ""


def _glibcxx(host: Host) -> int:
    folders = [each.folder for each in _with_libstdcxx(host)]
    for path in [Path(folder) / "libstdc++.so.6" for folder in folders] + [
        host.path(folder) / "libstdc++.so.6" for folder in LIBRARY_FOLDERS
    ]:
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                versions = [int(number) for number in re.findall(rb"GLIBCXX_3\.4\.(\d+)", data)]
        except (OSError, ValueError):
            continue
        return max(versions, default=0)
    return 0


def _with_libstdcxx(host: Host) -> list[Override]:
    parts = [part for part in host.environ.get("LD_LIBRARY_PATH", "").split(":") if part]
    return [each for each in map(_override, parts) if "libstdc++.so.6" in each.libraries]


def _runtimes(host: Host) -> tuple[str, ...]:
    folders = [*host.path("/usr/local").glob("cuda*/lib64"), Path(host.prefix) / "lib"]
    found: dict[str, str] = {}
    for folder in folders:
        for library in sorted(folder.glob("libcudart.so.[0-9]*")):
            found.setdefault(os.path.realpath(library), str(library))
    return tuple(found.values())
