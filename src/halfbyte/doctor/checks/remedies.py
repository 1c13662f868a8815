"""Fixes that several checks offer: the torch that fits a driver, a GPU and a Python; folders and variables."""

from __future__ import annotations

from halfbyte.doctor import versions
from halfbyte.doctor.differential import Culprit
from halfbyte.doctor.explain import explain
from halfbyte.doctor.facts.gpu import Gpu
from halfbyte.doctor.facts.installer import Installer
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Fix

__all__ = ["ROCM_INDEX", "blame", "cache_folder", "class_of", "fitting_torch", "without", "writable_cache"]

ROCM_INDEX = "https://download.pytorch.org/whl/rocm6.4"


def fitting_torch(
    installer: Installer, host: Host, gpu: Gpu, *, capability: tuple[int, int] | None = None
) -> tuple[Fix, ...]:
    """The newest torch that this driver, GPU and Python can use; empty where the table knows none.

    Args:
        installer: Who installs here.
        host: For the Python version and the machine.
        gpu: For the driver and the GPUs' capabilities.
        capability: The GPU that matters; None takes the oldest one known.
    """
    known = [each.capability for each in gpu.smi if each.capability != (0, 0)]
    wheel = versions.newest_torch_for(
        driver=gpu.driver or None,
        capability=capability or min(known, default=None),
        python=host.python[:2],
        machine=host.machine,
    )
    if wheel is None:
        return ()
    title = f"install torch {wheel.torch} for CUDA {wheel.cuda}, which this GPU and driver can run"
    return (installer.install(title, wheel.requirement, index_url=wheel.index_url, force=True),)


def class_of(text: str) -> tuple[str, ...]:
    """The failure class that an error text shows, as ``explain`` names it; empty where none is known.

    >>> class_of("PTXASError: Feature '.bf16' requires .target sm_80 or higher")
    ('B4',)
    """
    return tuple(match.entry.id for match in explain(text))[:1]


def blame(culprit: Culprit) -> str:
    """A sentence that names what was found by taking it away."""
    if culprit.name == "cwd":
        return "it works when run from another folder, so a file in this folder is in the way"
    part = f" (the folder {culprit.part})" if culprit.part and culprit.part != culprit.value else ""
    return f"it works without {culprit.name}{part}, so that is what breaks it"


def without(culprit: Culprit) -> Fix:
    """Do without the culprit."""
    titles = {"cwd": "run from another folder", "user site-packages": "leave out the user's own site-packages"}
    return Fix(titles.get(culprit.name, f"do without that part of {culprit.name}"), culprit.remedy)


def cache_folder(host: Host, name: str) -> str:
    """A folder for caches that surely can be written and belongs to this user."""
    base = host.environ.get("TMPDIR", "/tmp").rstrip("/") or "/tmp"
    return f"{base}/{name}-$(id -u)" if not host.windows else f"%TEMP%\\{name}"


def writable_cache(host: Host, variable: str, name: str) -> Fix:
    """Put a cache elsewhere."""
    setter = "set" if host.windows else "export"
    return Fix("use a folder that can be written", f"{setter} {variable}={cache_folder(host, name)}", safe=True)
