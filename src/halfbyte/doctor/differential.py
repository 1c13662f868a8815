"""Finding the culprit: a failing probe runs again with one suspect taken away; if that makes it work, it is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from halfbyte.doctor.children import Outcome, Request
from halfbyte.doctor.host import Host

__all__ = ["Culprit", "find_culprit", "suspects"]

VARIABLES = (
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "PYTHONPATH",
)
MOST_FOLDERS = 8


@dataclass(frozen=True)
class Culprit:
    """What made the probe fail.

    Attributes:
        name: The variable, ``"cwd"`` or ``"user site-packages"``.
        part: The one folder of a path variable that does it; empty where none does alone.
        value: What the variable holds.
    """

    name: str
    part: str = ""
    value: str = ""

    @property
    def remedy(self) -> str:
        """What to type."""
        if self.name == "cwd":
            return "cd ~"
        if self.name == "user site-packages":
            return "export PYTHONNOUSERSITE=1"
        if not self.part:
            return f"unset {self.name}"
        kept = [part for part in self.value.split(os.pathsep) if part and part != self.part]
        return f"export {self.name}={os.pathsep.join(kept)}" if kept else f"unset {self.name}"


def suspects(host: Host) -> tuple[str, ...]:
    """Names of what could be taken away here."""
    found = [name for name in VARIABLES if name in host.environ]
    here = os.path.realpath(host.cwd)
    if any(os.path.realpath(entry) == here for entry in host.search_path):
        found.append("cwd")
    local = os.path.realpath(host.home / ".local")
    if any(os.path.realpath(entry).startswith(local + os.sep) for entry in host.search_path):
        found.append("user site-packages")
    return tuple(found)


def find_culprit(host: Host, request: Request, works: Callable[[Outcome], bool]) -> tuple[Culprit | None, Outcome]:
    """Run a failed probe again without each suspect.

    Args:
        host: The machine.
        request: What failed.
        works: Whether an outcome is a success.

    Returns:
        The culprit and the outcome without it, or None and an empty outcome.
    """
    for name in suspects(host):
        again = host.probe(host, replace(request, without=(name,)))
        if works(again):
            return _part(host, request, name, works), again
    return None, Outcome()


def _part(host: Host, request: Request, name: str, works: Callable[[Outcome], bool]) -> Culprit:
    """Narrow ``LD_LIBRARY_PATH`` down to one of its folders."""
    value = host.environ.get(name, "")
    if name == "LD_LIBRARY_PATH" and value.count(os.pathsep) < MOST_FOLDERS:
        for folder, others in _one_less(value):
            if works(host.probe(host, replace(request, changed={**request.changed, name: others}))):
                return Culprit(name, folder, value)
    return Culprit(name, "", value)


def _one_less(value: str) -> Iterator[tuple[str, str]]:
    folders = [part for part in value.split(os.pathsep) if part]
    for folder in dict.fromkeys(folders):
        yield folder, os.pathsep.join(part for part in folders if part != folder)
