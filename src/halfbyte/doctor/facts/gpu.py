"""GPUs as the operating system shows them: bus, kernel modules, device files, driver, container. No CUDA context."""

from __future__ import annotations

import errno
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from halfbyte.doctor.host import Host
from halfbyte.doctor.registry import fact

__all__ = ["Gpu", "Node", "SmiGpu", "gpu"]

_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_DISPLAY_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")
LIBRARY_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/lib64-nvidia",
    "/usr/local/nvidia/lib64",
    "/run/opengl-driver/lib",
)
"""Where distributions, Colab, Kubernetes and NixOS put ``libcuda.so.1``."""
_SMI_FIELDS = ("name", "driver_version", "memory.total", "memory.used", "compute_cap")


@dataclass(frozen=True)
class Node:
    """A device file: ``problem`` is empty, or the name of the error that opening it would give; ``group`` owns it."""

    path: str
    problem: str = ""
    group: str = ""
    mode: int = 0


@dataclass(frozen=True)
class SmiGpu:
    """One GPU as ``nvidia-smi`` lists it; memory in MiB, capability (0, 0) where an old driver does not tell."""

    name: str
    memory: int = 0
    used: int = 0
    capability: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Gpu:
    """What the operating system knows of GPUs.

    Attributes:
        bus: Vendors of the GPUs on the PCI bus.
        driver: Version of the loaded NVIDIA kernel module; empty for none.
        userspace: Version of the NVIDIA libraries (``libcuda``); empty where not found.
        nodes: NVIDIA device files.
        modules: Loaded kernel modules that matter here.
        smi: GPUs that ``nvidia-smi`` lists.
        smi_error: What it says instead; empty where it works or is absent.
        container: ``"Docker"``, ``"Podman"``, ``"Kubernetes"``, ``"container"``; empty outside one.
        wsl: Windows' Linux.
        wsl_library: ``/usr/lib/wsl/lib/libcuda.so.1`` is there.
        windows_driver: Windows' ``nvcuda.dll`` is there.
        jetson: First line of ``/etc/nv_tegra_release``.
        nvswitches: Number of NVSwitch device files.
        fabric_manager: Whether it runs; None where that cannot be told (in a container).
        kfd: Problem with AMD's ``/dev/kfd``: ``"missing"``, ``"EACCES"``; empty where it is usable.
    """

    bus: tuple[str, ...] = ()
    driver: str = ""
    userspace: str = ""
    nodes: tuple[Node, ...] = ()
    modules: frozenset[str] = frozenset()
    smi: tuple[SmiGpu, ...] = ()
    smi_error: str = ""
    container: str = ""
    wsl: bool = False
    wsl_library: bool = False
    windows_driver: bool = False
    jetson: str = ""
    nvswitches: int = 0
    fabric_manager: bool | None = None
    kfd: str = "missing"

    @property
    def nvidia(self) -> bool:
        """Whether an NVIDIA GPU or its driver shows at all."""
        reached = bool(self.driver or self.smi or self.gpu_nodes or self.windows_driver or self.jetson)
        return reached or self.wsl_library or "NVIDIA" in self.bus

    @property
    def reachable(self) -> bool:
        """Whether there is a driver to talk to: a GPU that torch ought to use."""
        hidden = bool(self.container) and not self.gpu_nodes and not self.wsl_library and not self.jetson
        return (self.nvidia and not hidden and (self.driver != "" or self.nodes != () or self.smi != ())) or (
            self.wsl_library or self.windows_driver or bool(self.jetson)
        )

    @property
    def amd(self) -> bool:
        """Whether an AMD GPU with its compute driver is there."""
        return self.kfd != "missing"

    @property
    def gpu_nodes(self) -> tuple[Node, ...]:
        """Device files of single GPUs."""
        return tuple(node for node in self.nodes if re.fullmatch(r".*/nvidia\d+", node.path))

    @property
    def names(self) -> str:
        """GPUs in a few words."""
        names = [each.name for each in self.smi] or [f"{vendor} GPU" for vendor in self.bus]
        counted = {name: names.count(name) for name in names}
        return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counted.items()) or "a GPU"


@fact
def gpu(host: Host) -> Gpu:
    """GPUs as the operating system shows them."""
    listed, error, smi_driver = _smi(host)
    nodes = tuple(_node(host, path) for path in sorted(host.path("/dev").glob("nvidia*")) if not path.is_dir())
    return Gpu(
        bus=_bus(host),
        driver=_kernel_module(host) or (smi_driver if host.windows or listed else ""),
        userspace=_userspace(host),
        nodes=nodes,
        modules=_modules(host),
        smi=listed,
        smi_error=error,
        container=_container(host),
        wsl="microsoft" in host.read("/proc/version").lower(),
        wsl_library=host.path("/usr/lib/wsl/lib/libcuda.so.1").exists(),
        windows_driver=host.windows
        and (Path(host.environ.get("SystemRoot", "C:/Windows")) / "System32/nvcuda.dll").exists(),
        jetson=host.read("/etc/nv_tegra_release").split("\n", 1)[0].strip(),
        nvswitches=len(list(host.path("/dev").glob("nvidia-nvswitch[0-9]*"))),
        fabric_manager=_fabric_manager(host),
        kfd=_node(host, host.path("/dev/kfd")).problem,
    )


def _bus(host: Host) -> tuple[str, ...]:
    found: list[str] = []
    for device in sorted(host.path("/sys/bus/pci/devices").glob("*")):
        kind, vendor = _read(device / "class"), _read(device / "vendor")
        if kind.startswith(_DISPLAY_CLASSES) and vendor in _VENDORS:
            found.append(_VENDORS[vendor])
    return tuple(found)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _kernel_module(host: Host) -> str:
    match = re.search(r"Kernel Module.*?(\d{3,}\.\d+(?:\.\d+)?)", host.read("/proc/driver/nvidia/version"))
    return match.group(1) if match else ""


def _userspace(host: Host) -> str:
    for folder in LIBRARY_FOLDERS:
        library = host.path(folder) / "libcuda.so.1"
        match = re.search(r"libcuda\.so\.(\d{3,}[\d.]*)$", os.path.realpath(library))
        if match:
            return match.group(1)
    return ""


def _node(host: Host, path: Path) -> Node:
    try:
        status = path.stat()
    except OSError:
        return Node(str(path), "missing")
    problem = "" if os.access(path, os.R_OK | os.W_OK) else "EACCES"
    if not problem and path.name == "nvidiactl":  # the one node that costs nothing to open
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError as error:
            problem = errno.errorcode.get(error.errno or 0, str(error))
    return Node("/dev/" + path.name, problem, _group(host, status.st_gid), status.st_mode & 0o777)


def _group(host: Host, number: int) -> str:
    match = re.search(rf"^([^:\n]+):[^:\n]*:{number}:", host.read("/etc/group"), flags=re.MULTILINE)
    return match.group(1) if match else str(number)


def _modules(host: Host) -> frozenset[str]:
    loaded = {line.split(" ", 1)[0] for line in host.read("/proc/modules").splitlines()}
    return frozenset(loaded & {"nvidia", "nvidia_uvm", "nouveau", "amdgpu", "i915", "xe"})


def _container(host: Host) -> str:
    groups = host.read("/proc/1/cgroup") + host.read("/proc/self/cgroup")
    if "KUBERNETES_SERVICE_HOST" in host.environ or "kubepods" in groups:
        return "Kubernetes"
    if host.path("/.dockerenv").exists() or "docker" in groups:
        return "Docker"
    if host.path("/run/.containerenv").exists():
        return "Podman"
    return "container" if host.environ.get("container") or host.environ.get("SINGULARITY_NAME") else ""


def _fabric_manager(host: Host) -> bool | None:
    if _container(host):
        return None
    return any("nv-fabricmanage" in _read(path) for path in host.path("/proc").glob("[0-9]*/comm"))


def _smi_program(host: Host) -> str:
    if host.root != Path("/"):
        planted = host.path("/usr/bin/nvidia-smi")
        return str(planted) if planted.is_file() else ""
    return shutil.which("nvidia-smi", path=host.environ.get("PATH")) or (
        "/usr/lib/wsl/lib/nvidia-smi" if Path("/usr/lib/wsl/lib/nvidia-smi").exists() else ""
    )


def _smi(host: Host) -> tuple[tuple[SmiGpu, ...], str, str]:
    """GPUs, the error instead of them, and the driver's version."""
    program = _smi_program(host)
    if not program:
        return (), "", ""
    for count in (len(_SMI_FIELDS), len(_SMI_FIELDS) - 1):  # drivers before 510 know no compute_cap
        fields = ",".join(_SMI_FIELDS[:count])
        done = host.run([program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"], 8.0)
        if done.code == 0:
            rows = [[cell.strip() for cell in line.split(",")] for line in done.output.splitlines() if "," in line]
            rows = [row for row in rows if len(row) == count]
            return tuple(_smi_gpu(row) for row in rows), "", rows[0][1] if rows else ""
        if done.code is None:
            break
    return (), "; ".join(done.output.split("\n")).strip("; ")[:300] or f"exit status {done.code}", ""


def _smi_gpu(row: list[str]) -> SmiGpu:
    major, _, minor = row[4].partition(".") if len(row) > 4 else ("0", "", "0")
    capability = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
    return SmiGpu(row[0], _whole(row[2]), _whole(row[3]), capability)


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else 0
