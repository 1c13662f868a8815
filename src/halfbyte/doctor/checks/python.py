"""Python and packages: the ground that everything else stands on."""

from __future__ import annotations

import re

from halfbyte._version import __version__
from halfbyte.doctor import versions
from halfbyte.doctor.checks.remedies import fitting_torch
from halfbyte.doctor.facts.gpu import Gpu
from halfbyte.doctor.facts.installer import Installer
from halfbyte.doctor.facts.loader import Loader
from halfbyte.doctor.facts.packages import Packages
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Fix, Result
from halfbyte.doctor.registry import check

__all__: list[str] = []

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 8)
OLDEST_GLIBC = (2, 28)
"""torch's Linux wheels are manylinux_2_28 since 2.6."""
NEEDED = {
    "numpy": "numpy>=1.26",
    "packaging": "packaging>=23",
    "safetensors": "safetensors>=0.4.3",
}
HELPFUL = {"psutil": "psutil>=5.9", "rich": "rich>=13"}


@check("PY101")
def python_version(host: Host) -> Result:
    """Python is 3.10 or later.

    What it means: halfbyte and the torch versions that it supports run on this interpreter.
    Why it matters: on an older Python, installers quietly choose packages that are years old.
    How to fix: make a new environment with a current Python.
    """
    version = ".".join(map(str, host.python))
    if host.python[:2] < OLDEST_PYTHON:
        command = "uv venv --python 3.12" if not host.windows else "py -3.12 -m venv .venv"
        return Result.failed(
            f"Python {version} is too old", fixes=(Fix("make an environment with a current Python", command),)
        )
    kind = "virtual environment" if host.prefix != host.base_prefix else "no virtual environment"
    return Result.passed(f"Python {version} on {host.system} {host.machine}", kind)


@check("PY102", requires=("PY101",), classes=("E5",))
def torch_installed(host: Host, torch_build: TorchBuild, packages: Packages, installer: Installer, gpu: Gpu) -> Result:
    """PyTorch is installed.

    What it means: an `import torch` from here finds something.
    Why it matters: halfbyte computes with torch's tensors; nothing works without it.
    How to fix: install the build that fits the GPU's driver; the report prints the exact line.
    """
    if torch_build.file:
        return Result.passed(
            f"torch {torch_build.version or 'of unknown version'}, {torch_build.kind}", torch_build.file
        )
    chosen = fitting_torch(installer, host, gpu) if gpu.reachable else ()
    fixes = chosen or (installer.install("install torch", "torch"),)
    package = packages.get("torch")
    if package:
        again = installer.install("install torch again", f"torch=={package.version}", force=True)
        return Result.failed(
            f"torch {package.version} is registered but its files are gone",
            package.folder,
            fixes=(again,),
            classes=("E5",),
        )
    return Result.failed("torch is not installed for this Python", f"searched by {host.executable}", fixes=fixes)


@check("PY103", requires=("PY102",))
def torch_recent(host: Host, torch_build: TorchBuild, installer: Installer, gpu: Gpu) -> Result:
    """PyTorch is 2.8 or later.

    What it means: the installed torch has the operator library that halfbyte's ops are defined with.
    Why it matters: older ones fail later, with errors that do not name the cause.
    How to fix: upgrade torch, keeping to what the driver can run.
    """
    found = versions.number(torch_build.version)
    if not found:
        return Result.skipped("torch does not say its version in a file")
    if found < OLDEST_TORCH:
        fixes = (fitting_torch(installer, host, gpu) if gpu.reachable else ()) or (
            installer.install("upgrade torch", "torch>=2.8", upgrade=True),
        )
        return Result.failed(f"torch {torch_build.version} is too old", "needed: 2.8 or later", fixes=fixes)
    return Result.passed(f"torch {torch_build.version} is supported")


@check("PY104", requires=("PY101",), classes=("E5",))
def needed_packages(packages: Packages, installer: Installer) -> Result:
    """The packages that halfbyte needs are installed.

    What it means: numpy, packaging and safetensors are there, with readable metadata; psutil and rich help.
    Why it matters: a half-removed package fails deep inside another one's import.
    How to fix: install what is named.
    """
    lacking = [name for name in NEEDED if not packages.get(name)]
    broken = [
        name for name in (*NEEDED, "torch", "bitsandbytes") if (found := packages.get(name)) and not found.complete
    ]
    fixes = tuple(installer.install(f"install {name}", NEEDED[name]) for name in lacking) + tuple(
        installer.install(f"install {name} again", name, force=True) for name in broken
    )
    if lacking:
        return Result.failed(f"not installed: {', '.join(lacking)}", fixes=fixes)
    if broken:
        return Result.warned(f"metadata is missing for: {', '.join(broken)}", fixes=fixes, classes=("E5",))
    absent = [name for name in HELPFUL if not packages.get(name)]
    if absent:
        fixes = tuple(installer.install(f"install {name}", HELPFUL[name]) for name in absent)
        return Result.warned(f"not installed, useful: {', '.join(absent)}", fixes=fixes)
    return Result.passed("numpy, packaging, safetensors, psutil and rich are there")


@check("PY105", requires=("PY102",), classes=("C11", "C13"))
def one_torch(packages: Packages, installer: Installer, torch_build: TorchBuild) -> Result:
    """There is one torch, by one installer.

    What it means: no second copy of torch, numpy or triton lies on the search path, and metadata and files agree.
    Why it matters: with two copies, the libraries of one and the Python files of the other get mixed.
    How to fix: uninstall until none is left, then install one.
    """
    doubled = {
        name: found
        for name in ("torch", "numpy", "triton", "bitsandbytes")
        if len(found := packages.found.get(name, ())) > 1
    }
    if doubled:
        lines = [f"{name} {each.version} in {each.folder}" for name, found in doubled.items() for each in found]
        names = " ".join(doubled)
        fixes = (
            Fix("remove every copy (repeat until none is found)", f"python -m pip uninstall -y {names}"),
            *(installer.install(f"install {name} once", name) for name in doubled),
        )
        conda = any(each.installer == "conda" for found in doubled.values() for each in found)
        classes = ("C13",) if conda or "torch" in doubled else ("C11",)
        return Result.warned(f"installed more than once: {', '.join(doubled)}", *lines, fixes=fixes, classes=classes)
    package = packages.get("torch")
    if package and torch_build.version and _release(package.version) != _release(torch_build.version):
        again = installer.install("install torch again", f"torch=={_release(package.version)}", force=True)
        return Result.failed(
            f"torch's files are {torch_build.version}, its metadata says {package.version}",
            fixes=(again,),
            classes=("C11",),
        )
    return Result.passed("no package is installed twice")


@check("PY106", requires=("PY101",), classes=("C8",))
def glibc(loader: Loader, host: Host) -> Result:
    """The C library is new enough for torch's wheels.

    What it means: glibc is 2.28 or later.
    Why it matters: wheels built for a newer one end in "version `GLIBC_2.28' not found", or pip takes a very old one.
    How to fix: use a newer distribution or a container image; glibc itself cannot be upgraded safely.
    """
    if host.system != "Linux" or not loader.glibc:
        return Result.skipped("the C library is not glibc, or its version is not known")
    if versions.number(loader.glibc) < OLDEST_GLIBC:
        fix = Fix("work in a container with a current distribution", "docker run --gpus all -it pytorch/pytorch:latest")
        return Result.failed(f"glibc {loader.glibc} is older than 2.28", fixes=(fix,), classes=("C8",))
    return Result.passed(f"glibc {loader.glibc}")


@check("PY107", classes=("C11",))
def halfbyte_itself(packages: Packages, installer: Installer) -> Result:
    """halfbyte's files and its metadata are of one version.

    What it means: the code that is running is the one that the installer knows.
    Why it matters: after an upgrade inside a running notebook, old and new modules get mixed.
    How to fix: restart the process; if that does not help, install again.
    """
    found = packages.get("halfbyte")
    if found is None:
        return Result.passed(f"halfbyte {__version__}, from a source folder")
    if found.version != __version__ and not re.search(r"dev|\+", found.version):
        again = installer.install("restart the process, or install halfbyte again", "halfbyte", force=True)
        return Result.warned(
            f"halfbyte {__version__} is running, {found.version} is installed", fixes=(again,), classes=("C11",)
        )
    return Result.passed(f"halfbyte {__version__}")


@check("PY108", requires=("PY102",), classes=("E6",))
def numpy_generation(packages: Packages, torch_build: TorchBuild, installer: Installer) -> Result:
    """NumPy and the packages built on it are of one generation.

    What it means: torch and numba accept the installed NumPy.
    Why it matters: code compiled for NumPy 1 fails under NumPy 2 with "_ARRAY_API not found", often as a mere warning.
    How to fix: upgrade the package that was built for NumPy 1, or go back to numpy<2.
    """
    numpy = versions.number(packages.version("numpy"))
    torch = versions.number(torch_build.version)
    if not numpy:
        return Result.skipped("numpy is not installed")
    if numpy >= (2, 0) and torch and torch < (2, 3):
        fixes = (
            installer.install("upgrade torch", "torch", upgrade=True),
            installer.install("or stay with NumPy 1", "numpy<2"),
        )
        return Result.failed(
            f"torch {torch_build.version} was built for NumPy 1, NumPy {packages.version('numpy')} is installed",
            fixes=fixes,
            classes=("E6",),
        )
    return Result.passed(f"numpy {packages.version('numpy')}")


def _release(version: str) -> str:
    return version.split("+", 1)[0]
