"""The failure classes as data: one module a group, in the order in which a stack breaks."""

from __future__ import annotations

from halfbyte.doctor.catalogue import (
    a_reach,
    b_capability,
    c_libraries,
    d_toolchain,
    e_packages,
    f_platforms,
    g_silent,
)
from halfbyte.doctor.catalogue.entry import FailureClass, Kind, Reading, Remedy

__all__ = ["CLASSES", "GROUPS", "FailureClass", "Kind", "Reading", "Remedy", "get"]

GROUPS: dict[str, str] = {
    "A": "Is a GPU reachable at all",
    "B": "The GPU is visible but cannot run this code",
    "C": "Shared libraries and wheels",
    "D": "Triton and numba tool chain",
    "E": "Python packages and the Hugging Face stack",
    "F": "Platforms",
    "G": "Silent: no message at all",
}
"""Letter of the ids -> what its classes have in common."""

CLASSES: tuple[FailureClass, ...] = (
    *a_reach.CLASSES,
    *b_capability.CLASSES,
    *c_libraries.CLASSES,
    *d_toolchain.CLASSES,
    *e_packages.CLASSES,
    *f_platforms.CLASSES,
    *g_silent.CLASSES,
)
"""Every class, in order of its id."""

_BY_ID = {entry.id: entry for entry in CLASSES}


def get(name: str) -> FailureClass | None:
    """The class with an id, in any case; None for an unknown one.

    >>> get("a2").title
    'Driver too old for the CUDA version of this torch'
    """
    return _BY_ID.get(name.upper())
