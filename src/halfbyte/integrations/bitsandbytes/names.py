"""Which halfbyte module answers for which bitsandbytes module: the only table of them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from halfbyte._version import __version__

__all__ = [
    "FEATURES",
    "MODULES",
    "SUPPORTED_DEVICES",
    "VERSION",
    "is_there",
    "lookup",
    "public_names",
]

VERSION = "0.50.2+halfbyte"
"""Advertised version. Libraries ask for >= 0.48 at most, and vLLM compares it as text with "0.46.1"."""

FEATURES = frozenset({"multi_backend"})
"""``bitsandbytes.features``: accelerate trains off CUDA only where it finds "multi_backend" here."""

SUPPORTED_DEVICES = frozenset({"cpu", "cuda", "xpu", "hpu", "npu", "mps"})
"""``bitsandbytes.supported_torch_devices``: transformers intersects it with the devices it finds."""

_OWN = "halfbyte.integrations.bitsandbytes"

MODULES: dict[str, tuple[str, ...]] = {
    "": ("halfbyte.autograd",),
    "__main__": (),
    "autograd": ("halfbyte.autograd",),
    "autograd._functions": ("halfbyte.autograd",),
    "cextension": (f"{_OWN}.cextension",),
    "consts": (f"{_OWN}.consts",),
    "cuda_specs": (f"{_OWN}.cuda_specs",),
    "functional": ("halfbyte.functional",),
    "nn": ("halfbyte.nn",),
    "nn.modules": ("halfbyte.nn",),
    "nn.parametrize": ("halfbyte.nn.parametrize",),
    "optim": ("halfbyte.optim",),
    "optim.adagrad": ("halfbyte.optim",),
    "optim.adam": ("halfbyte.optim",),
    "optim.adamw": ("halfbyte.optim",),
    "optim.ademamix": ("halfbyte.optim",),
    "optim.lamb": ("halfbyte.optim",),
    "optim.lars": ("halfbyte.optim",),
    "optim.lion": ("halfbyte.optim",),
    "optim.optimizer": ("halfbyte.optim",),
    "optim.rmsprop": ("halfbyte.optim",),
    "optim.sgd": ("halfbyte.optim",),
    "utils": (f"{_OWN}.helpers",),
}
"""Module below ``bitsandbytes`` ("" is itself) -> the halfbyte modules in which its names are looked up, in order."""

_ALIASES = {"modules": "nn.modules", "adam": "optim.adam"}
"""Modules that bitsandbytes also offers at its top."""


def is_there(module: str) -> bool:
    """Whether halfbyte has the modules that answer for ``bitsandbytes.<module>``.

    >>> is_there("nn.modules"), is_there("research")
    (True, False)
    """
    homes = MODULES.get(module)
    return homes is not None and all(_exists(home) for home in homes)


def _exists(home: str) -> bool:
    spec = importlib.util.find_spec(home)
    # A folder without a module in it has no origin.
    return spec is not None and spec.origin is not None


def lookup(module: str, name: str) -> Any:
    """The value of ``bitsandbytes.<module>.<name>``.

    Raises:
        AttributeError: halfbyte has no such name.

    >>> lookup("nn.modules", "Params4bit") is lookup("nn", "Params4bit")
    True
    """
    inner = f"{module}.{name}" if module else _ALIASES.get(name, name)
    if inner in MODULES and inner != "__main__" and is_there(inner):
        return importlib.import_module(f"bitsandbytes.{inner}")
    if not name.startswith("__"):
        for home in MODULES[module]:
            found = getattr(importlib.import_module(home), name, None)
            if found is not None:
                return found
    raise AttributeError(missing(f"{module}.{name}".lstrip(".")))


def missing(what: str) -> str:
    """The text for a part of bitsandbytes that halfbyte does not offer."""
    return (
        f"halfbyte {__version__} offers no bitsandbytes.{what}\n"
        "hint: `pip install -U halfbyte` if it is newer than yours; docs/compatibility.md lists what there is"
    )


def public_names(module: str) -> list[str]:
    """What ``dir`` and ``import *`` show of ``bitsandbytes.<module>``."""
    names: set[str] = set()
    for home in MODULES[module]:
        found = importlib.import_module(home)
        names |= set(getattr(found, "__all__", None) or (n for n in vars(found) if not n.startswith("_")))
    prefix = f"{module}." if module else ""
    inner = {other.removeprefix(prefix) for other in MODULES if other.startswith(prefix) and other not in {"", module}}
    names |= {other for other in inner if "." not in other and other != "__main__" and is_there(prefix + other)}
    return sorted(names)
