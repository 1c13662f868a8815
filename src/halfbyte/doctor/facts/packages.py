"""Installed distributions and where an import would take a module from; read from folders, nothing is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from halfbyte.doctor.host import Host
from halfbyte.doctor.registry import fact

__all__ = ["SHADOWED_OFTEN", "Module", "Package", "Packages", "locate", "packages"]

SHADOWED_OFTEN = (
    "torch",
    "triton",
    "numpy",
    "numba",
    "bitsandbytes",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "packaging",
)
"""Modules for which a user's own file of that name has been seen to break an import."""

_READ_REQUIREMENTS_OF = {"torch", "numba", "halfbyte", "bitsandbytes"}


@dataclass(frozen=True)
class Package:
    """One distribution on the search path.

    Attributes:
        name: Normalised: lower case, dashes.
        version: As installed.
        folder: Folder that holds it.
        requires: Its ``Requires-Dist`` lines, for those few that checks ask about.
        installer: ``"pip"``, ``"uv"``, ``"conda"``; empty where unknown.
        complete: Its metadata can be read.
    """

    name: str
    version: str
    folder: str = ""
    requires: tuple[str, ...] = ()
    installer: str = ""
    complete: bool = True


@dataclass(frozen=True)
class Module:
    """Where ``import name`` looks first: a file or folder, in an entry of the search path."""

    name: str
    path: str
    entry: str

    @property
    def stand_in(self) -> bool:
        """Whether it is halfbyte in the place of bitsandbytes."""
        text = _read(Path(self.path)) if self.name == "bitsandbytes" else ""
        return bool(re.search(r"^(from|import) halfbyte\b", text, flags=re.MULTILINE))


@dataclass(frozen=True)
class Packages:
    """All distributions, and the modules that are often shadowed.

    Attributes:
        found: Normalised name -> distributions, in search order.
        modules: Module name -> every place that has it, in search order.
    """

    found: Mapping[str, tuple[Package, ...]] = field(default_factory=dict[str, tuple[Package, ...]])
    modules: Mapping[str, tuple[Module, ...]] = field(default_factory=dict[str, tuple[Module, ...]])

    def get(self, name: str) -> Package | None:
        """The distribution that counts: the first one."""
        return next(iter(self.found.get(name, ())), None)

    def version(self, name: str) -> str:
        """Its version; empty where it is not installed."""
        package = self.get(name)
        return package.version if package else ""

    def module(self, name: str) -> Module | None:
        """Where an import of that name is taken from."""
        return next(iter(self.modules.get(name, ())), None)


@fact
def packages(host: Host) -> Packages:
    """Distributions and modules on the search path."""
    found: dict[str, list[Package]] = {}
    for entry in _folders(host):
        for package in _distributions(entry):
            found.setdefault(package.name, []).append(package)
    modules = {name: tuple(locate(host, name)) for name in SHADOWED_OFTEN}
    return Packages({name: tuple(each) for name, each in found.items()}, modules)


def _folders(host: Host) -> list[str]:
    unique: dict[str, str] = {}
    for entry in host.search_path:
        if os.path.isdir(entry):  # noqa: PTH112
            unique.setdefault(os.path.realpath(entry), entry)
    return list(unique.values())


def locate(host: Host, name: str) -> Iterable[Module]:
    """Every place of the search path that has a module of that name, namespace folders last, as imports do."""
    packages: list[Module] = []
    bare: list[Module] = []
    for entry in _folders(host):
        folder = Path(entry) / name
        for path in (folder / "__init__.py", Path(entry) / f"{name}.py"):
            if path.is_file():
                packages.append(Module(name, str(path), entry))
                break
        else:
            if folder.is_dir():
                bare.append(Module(name, str(folder), entry))
    return packages + bare


def _distributions(entry: str) -> Iterable[Package]:
    try:
        names = sorted(os.listdir(entry))  # noqa: PTH208
    except OSError:
        return
    for name in names:
        match = re.fullmatch(r"(?P<name>[\w.\-]+?)-(?P<version>[^-]+)\.(dist-info|egg-info)", name)
        if match:
            yield _package(match["name"], match["version"], Path(entry), Path(entry) / name)


def _package(name: str, version: str, folder: Path, info: Path) -> Package:
    name = re.sub(r"[-_.]+", "-", name).lower()
    metadata = info if info.is_file() else info / ("METADATA" if info.suffix == ".dist-info" else "PKG-INFO")
    requires: tuple[str, ...] = ()
    if name in _READ_REQUIREMENTS_OF:
        requires = tuple(re.findall(r"^Requires-Dist: *(.+)$", _read(metadata), flags=re.MULTILINE))
    return Package(name, version, str(folder), requires, _read(info / "INSTALLER").strip(), metadata.is_file())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
