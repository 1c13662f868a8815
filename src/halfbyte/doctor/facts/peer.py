"""A real bitsandbytes beside us: version, binaries, the one it would load for this torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from halfbyte.doctor import versions
from halfbyte.doctor.facts.packages import Packages
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.host import Host
from halfbyte.doctor.registry import fact

__all__ = ["Peer", "peer"]


@dataclass(frozen=True)
class Peer:
    """A real bitsandbytes.

    Attributes:
        version: Installed version; empty where there is none, or only halfbyte's stand-in.
        folder: The package's folder; empty where only its metadata is there.
        cuda: CUDA versions that it has binaries for.
        rocm: ROCm versions that it has binaries for.
        cpu: It has a CPU binary.
        pick: Binary that it would load for the installed torch; empty where none matches.
        forced: Value of ``BNB_CUDA_VERSION``; empty when unset.
        checkout: The folder is a source checkout without binaries.
        stand_in: The distribution named bitsandbytes is halfbyte's own.
    """

    version: str = ""
    folder: str = ""
    cuda: tuple[str, ...] = ()
    rocm: tuple[str, ...] = ()
    cpu: bool = False
    pick: str = ""
    forced: str = ""
    checkout: bool = False
    stand_in: bool = False

    @property
    def binaries(self) -> str:
        """All binaries in a few words: ``"CPU; CUDA 11.8, 12.1; ROCm 6.4"``."""
        parts = ["CPU"] if self.cpu else []
        parts += [f"CUDA {', '.join(self.cuda)}"] if self.cuda else []
        parts += [f"ROCm {', '.join(self.rocm)}"] if self.rocm else []
        return "; ".join(parts) or "none"


@fact
def peer(host: Host, packages: Packages, torch_build: TorchBuild) -> Peer:
    """The bitsandbytes that an import would take."""
    package, module = packages.get("bitsandbytes"), packages.module("bitsandbytes")
    if package and any(line.split(";")[0].strip().startswith("halfbyte") for line in package.requires):
        return Peer(stand_in=True)
    if module is not None and module.stand_in:
        return Peer(stand_in=True)
    if package is None and module is None:
        return Peer()
    folder = Path(module.path).parent if module and module.path.endswith("__init__.py") else None
    names = [path.name for path in folder.glob("libbitsandbytes_*")] if folder else []
    cuda = tuple(sorted(_versions(names, "cuda", 2), key=versions.number))
    rocm = tuple(sorted(_versions(names, "rocm", 1), key=versions.number))
    version = package.version if package else "0"
    forced = host.environ.get("BNB_CUDA_VERSION", "")
    return Peer(
        version=version,
        folder=str(folder or ""),
        cuda=cuda,
        rocm=rocm,
        cpu=any(name.startswith("libbitsandbytes_cpu.") for name in names),
        pick=_pick(names, cuda, rocm, torch_build, version, forced),
        forced=forced,
        checkout=folder is not None and not names and (folder.parent / "csrc").is_dir(),
    )


def _versions(names: list[str], prefix: str, digits: int) -> set[str]:
    found = (re.match(rf"libbitsandbytes_{prefix}(\d{{{digits}}})(\d+)(?:_\w+)?\.", name) for name in names)
    return {f"{match[1]}.{match[2]}" for match in found if match}


def _pick(
    names: list[str], cuda: tuple[str, ...], rocm: tuple[str, ...], torch: TorchBuild, version: str, forced: str
) -> str:
    """File name that it loads, by its own rules; empty where it finds none."""
    ending = next((Path(name).suffix for name in names), ".so")
    if torch.cuda and forced:
        wanted = f"libbitsandbytes_cuda{forced}{ending}"
        return wanted if wanted in names else ""
    kind, available, runtime = ("cuda", cuda, torch.cuda) if torch.cuda else ("rocm", rocm, torch.hip)
    if runtime:
        short = ".".join(str(part) for part in versions.number(runtime))
        chosen = versions.bitsandbytes_pick(available, short, version)
        return f"libbitsandbytes_{kind}{chosen.replace('.', '')}{ending}" if chosen else ""
    return next((name for name in names if name.startswith("libbitsandbytes_cpu.")), "")
