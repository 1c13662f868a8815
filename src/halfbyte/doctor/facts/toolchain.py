"""What Triton and numba need to compile: compiler, headers, ptxas, caches, sources. Nothing is compiled here."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from halfbyte.doctor.facts.packages import Packages, locate
from halfbyte.doctor.host import Host
from halfbyte.doctor.registry import fact

__all__ = ["NOWHERE", "Folder", "Ptxas", "Toolchain", "folder_state", "toolchain"]


@dataclass(frozen=True)
class Folder:
    """A cache folder: ``problem`` says why it cannot be written, ``noexec`` that libraries in it cannot be loaded."""

    path: str
    problem: str = ""
    noexec: bool = False
    free: int = 0


NOWHERE = Folder("")
"""Not known on this system."""


@dataclass(frozen=True)
class Ptxas:
    """One assembler: which variable or package names it, and the CUDA version that it is from; empty if it fails."""

    path: str
    version: str = ""
    named_by: str = ""


NO_PTXAS = Ptxas("")


@dataclass(frozen=True)
class Toolchain:
    """What compiling needs.

    Attributes:
        triton: Installed version; empty for none.
        triton_source: Triton's and halfbyte's kernels are there as ``.py`` files.
        compiler: Path of the C compiler that Triton would take; empty for none.
        compiler_from: ``"CC"`` or ``"PATH"``.
        header: ``Python.h`` is there.
        ptxas: Assembler for GPUs before compute capability 9.0 (all GPUs in Triton before 3.5).
        ptxas_new: Assembler for those from 9.0 on; empty path where this Triton has no second one.
        triton_cache: Where Triton writes.
        numba_cache: Where numba would write halfbyte's kernels.
        own_build: Triton's build is replaced through ``TRITON_BUILD_...`` or a bundled compiler (Windows).
    """

    triton: str = ""
    triton_source: bool = True
    compiler: str = ""
    compiler_from: str = "PATH"
    header: bool = True
    ptxas: Ptxas = NO_PTXAS
    ptxas_new: Ptxas = NO_PTXAS
    triton_cache: Folder = NOWHERE
    numba_cache: Folder = NOWHERE
    own_build: bool = False


@fact
def toolchain(host: Host, packages: Packages) -> Toolchain:
    """What compiling needs and what is there."""
    version = packages.version("triton") or packages.version("triton-windows") or packages.version("pytorch-triton")
    module = next(iter(locate(host, "triton")), None)
    home = Path(module.path).parent if module and module.path.endswith("__init__.py") else None
    compiler, source = _compiler(host)
    return Toolchain(
        triton=version or ("unknown" if home else ""),
        triton_source=home is None or (home / "language" / "core.py").is_file(),
        compiler=compiler,
        compiler_from=source,
        header=(Path(host.include) / "Python.h").is_file(),
        ptxas=_ptxas(host, home, "ptxas", "TRITON_PTXAS_PATH"),
        ptxas_new=_ptxas(host, home, "ptxas-blackwell", "TRITON_PTXAS_BLACKWELL_PATH"),
        triton_cache=folder_state(_triton_cache(host)),
        numba_cache=folder_state(_numba_cache(host)),
        own_build=host.windows and home is not None and (home / "runtime" / "tcc").is_dir(),
    )


def _compiler(host: Host) -> tuple[str, str]:
    """What Triton takes: ``CC`` as it is, else gcc, else clang; its path (empty: not there) and where it is from."""
    path = host.environ.get("PATH", os.defpath)
    named = host.environ.get("CC")
    if named:
        return shutil.which(named, path=path) or "", "CC"
    return next((found for name in ("gcc", "clang") if (found := shutil.which(name, path=path))), ""), "PATH"


def _ptxas(host: Host, home: Path | None, name: str, variable: str) -> Ptxas:
    named = host.environ.get(variable, "")
    path = named or (str(home / "backends" / "nvidia" / "bin" / name) if home else "")
    if not path or not Path(path).is_file():
        return Ptxas(named, "", variable if named else "")
    done = host.run([path, "--version"], 5.0)
    match = re.search(r"release (\d+\.\d+)", done.output) if done.code == 0 else None
    return Ptxas(path, match.group(1) if match else "", variable if named else "")


def _triton_cache(host: Host) -> Path:
    named = host.environ.get("TRITON_CACHE_DIR")
    if named:
        return Path(named)
    return Path(host.environ.get("TRITON_HOME") or host.home) / ".triton" / "cache"


def _numba_cache(host: Host) -> Path:
    named = host.environ.get("NUMBA_CACHE_DIR") or host.environ.get("HALFBYTE_CACHE_DIR")
    if named:
        return Path(named)
    return Path(host.environ.get("XDG_CACHE_HOME") or host.home / ".cache") / "halfbyte"


def folder_state(path: Path) -> Folder:
    """Whether a folder could be made and written, without making it: its nearest parent that exists is asked."""
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        return Folder(str(path), f"{nearest} is not a folder")
    try:
        status = os.statvfs(nearest) if hasattr(os, "statvfs") else None
    except OSError as error:
        return Folder(str(path), str(error))
    free = status.f_bavail * status.f_frsize if status else shutil.disk_usage(nearest).free
    noexec = bool(status and status.f_flag & getattr(os, "ST_NOEXEC", 0))
    return Folder(str(path), _write_problem(nearest, status), noexec, free)


def _write_problem(folder: Path, status: os.statvfs_result | None) -> str:
    if status and status.f_flag & getattr(os, "ST_RDONLY", 0):
        return f"{folder} is on a read-only file system"
    # The superuser passes access() everywhere; /proc and /sys still take no folders.
    if not os.access(folder, os.W_OK | os.X_OK) or folder.parts[1:2] in {("proc",), ("sys",)}:
        return f"{folder} cannot be written"
    return ""
