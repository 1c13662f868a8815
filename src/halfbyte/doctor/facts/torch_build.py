"""Which torch is installed, for which CUDA, ROCm or XPU, and which of its libraries are missing; read from files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from halfbyte.doctor.facts.packages import Packages
from halfbyte.doctor.host import Host
from halfbyte.doctor.registry import fact

__all__ = ["TorchBuild", "torch_build"]


@dataclass(frozen=True)
class TorchBuild:
    """The torch that an import would take.

    Attributes:
        version: ``"2.13.0+cpu"``; empty where it says none.
        cuda: CUDA version it was built for; empty for none.
        hip: ROCm version; empty for none.
        xpu: oneAPI version; empty for none.
        file: Where it is imported from; empty where there is no torch.
        missing: Runtime packages that it requires and that are not there, ``"nvidia-cublas-cu12==12.8.4.1"``.
        triton: Version of triton that it asks for; empty for none.
        installer: Who installed it.
    """

    version: str = ""
    cuda: str = ""
    hip: str = ""
    xpu: str = ""
    file: str = ""
    missing: tuple[str, ...] = ()
    triton: str = ""
    installer: str = ""

    @property
    def kind(self) -> str:
        """In words: ``"CUDA 13.0"``, ``"ROCm 6.4"``, ``"CPU only"``."""
        if self.cuda:
            return f"CUDA {self.cuda}"
        return f"ROCm {self.hip}" if self.hip else f"XPU {self.xpu}" if self.xpu else "CPU only"

    @property
    def accelerated(self) -> bool:
        """Whether it was built for any GPU."""
        return bool(self.cuda or self.hip or self.xpu)


@fact
def torch_build(host: Host, packages: Packages) -> TorchBuild:
    """The installed torch."""
    module, package = packages.module("torch"), packages.get("torch")
    if module is None:
        return TorchBuild()
    text = ""
    if module.path.endswith("__init__.py"):
        try:
            text = (Path(module.path).parent / "version.py").read_text(errors="replace")
        except OSError:
            text = ""
    requires = package.requires if package else ()
    return TorchBuild(
        version=_value(text, "__version__") or (package.version if package else ""),
        cuda=_value(text, "cuda"),
        hip=_value(text, "hip"),
        xpu=_value(text, "xpu"),
        file=module.path,
        missing=_missing(requires, packages, host),
        triton=_pinned_triton(requires),
        installer=package.installer if package else "",
    )


def _value(text: str, name: str) -> str:
    match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, flags=re.MULTILINE)
    return match.group(1) if match else ""


def _missing(requires: tuple[str, ...], packages: Packages, host: Host) -> tuple[str, ...]:
    if host.system != "Linux":  # on Windows the libraries are inside torch's own wheel
        return ()
    lacking: list[str] = []
    for line in requires:
        requirement, _, marker = line.partition(";")
        match = re.match(r"((?:nvidia|cuda)-[\w-]+)(?:\[[^\]]*\])?\s*\(?==\s*([\w.*+]+)", requirement.strip())
        if match is None or "extra" in marker or not _applies(marker, host):
            continue
        version = packages.version(re.sub(r"[-_.]+", "-", match[1]).lower())
        wanted = match[2]
        if version != wanted and not (wanted.endswith(".*") and version.startswith(wanted[:-1])):
            lacking.append(f"{match[1]}=={wanted}" + (f" (installed: {version})" if version else ""))
    return tuple(lacking)


def _applies(marker: str, host: Host) -> bool:
    machines = re.findall(r"platform_machine\s*==\s*['\"](\w+)['\"]", marker)
    return not machines or host.machine in machines


def _pinned_triton(requires: tuple[str, ...]) -> str:
    found = (re.match(r"(?:pytorch-)?triton(?:-rocm|-xpu)?\s*\(?==\s*([\w.+]+)", line) for line in requires)
    return next((match[1] for match in found if match), "")
