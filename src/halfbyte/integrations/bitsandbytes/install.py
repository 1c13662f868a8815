"""``install_as_bitsandbytes``: puts halfbyte in the place of bitsandbytes, in this process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

from halfbyte.errors import EnvironmentConflictError
from halfbyte.integrations import libraries
from halfbyte.integrations.bitsandbytes.finder import NAME, find_installed, put_first
from halfbyte.integrations.bitsandbytes.names import VERSION

__all__ = ["install_as_bitsandbytes"]

_OURS = "+halfbyte"
"""Ending of the version of everything that is ours."""


def install_as_bitsandbytes(replace: bool = False) -> None:
    """Make ``import bitsandbytes`` give halfbyte, here and in every library of this process.

    Early or late: what transformers, peft and accelerate found out about bitsandbytes before is made up for. Nothing
    is imported by it, and a second call does nothing.

    Args:
        replace: Go before a bitsandbytes that is installed, also one that is imported already.

    Raises:
        EnvironmentConflictError: The real bitsandbytes can be imported, and ``replace`` is False.
    """
    there = find_installed()
    if there is None or not there.whole:
        version = _importable_version()
        if version is None or (replace and not version.endswith(_OURS)):
            put_first(whole=True)
        elif not version.endswith(_OURS):
            raise EnvironmentConflictError(
                f"bitsandbytes {version} is installed here and would be imported",
                expected="no bitsandbytes beside halfbyte",
                hint="`pip uninstall bitsandbytes`, or install_as_bitsandbytes(replace=True) / `halfbyte run --replace`"
                " to go before it in this process",
            )
    _forget_real()
    libraries.refresh(VERSION)
    libraries.watch()


def _importable_version() -> str | None:
    """Version of the bitsandbytes that ``import`` would give now; None without one."""
    loaded = sys.modules.get(NAME)
    if loaded is not None:
        return str(getattr(loaded, "__version__", "of unknown version"))
    spec = importlib.util.find_spec(NAME)
    # A folder of that name without code, such as a checkout beside the script, is no bitsandbytes.
    if spec is None or spec.loader is None or spec.origin is None:
        return None
    try:
        return importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _forget_real() -> None:
    """Drop modules of a real bitsandbytes that were imported, so that the next import finds ours."""
    loaded = sys.modules.get(NAME)
    if loaded is None or str(getattr(loaded, "__version__", "")).endswith(_OURS):
        return
    for name in [name for name in sys.modules if name == NAME or name.startswith(f"{NAME}.")]:
        del sys.modules[name]
