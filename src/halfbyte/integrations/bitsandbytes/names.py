"""Which halfbyte module answers for which bitsandbytes module: the only table of them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

from halfbyte._version import __version__
from halfbyte.integrations.bitsandbytes.retired import RETIRED, advice_for_module, stand_in

__all__ = [
    "FEATURES",
    "MODULES",
    "SUPPORTED_DEVICES",
    "VERSION",
    "is_there",
    "lookup",
    "public_names",
    "retired_name",
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
    "_ops": (f"{_OWN}.ops",),
    "autograd": ("halfbyte.autograd",),
    "autograd._functions": ("halfbyte.autograd",),
    "cextension": (f"{_OWN}.cextension",),
    "consts": (f"{_OWN}.consts",),
    "cuda_specs": (f"{_OWN}.cuda_specs",),
    "functional": ("halfbyte.functional", f"{_OWN}.legacy"),
    "nn": ("halfbyte.nn",),
    "nn.modules": ("halfbyte.nn",),
    "nn.triton_based_modules": (f"{_OWN}.research",),
    "nn.parametrize": ("halfbyte.nn.parametrize",),
    "optim": ("halfbyte.optim",),
    "optim.adagrad": ("halfbyte.optim",),
    "optim.adam": ("halfbyte.optim",),
    "optim.adamw": ("halfbyte.optim",),
    "optim.ademamix": ("halfbyte.optim", "halfbyte.optim.ademamix"),
    "optim.lamb": ("halfbyte.optim",),
    "optim.lars": ("halfbyte.optim",),
    "optim.lion": ("halfbyte.optim",),
    "optim.optimizer": ("halfbyte.optim",),
    "optim.rmsprop": ("halfbyte.optim",),
    "optim.sgd": ("halfbyte.optim",),
    "research": (f"{_OWN}.research",),
    "research.nn": (f"{_OWN}.research",),
    "research.nn.modules": (f"{_OWN}.research",),
    "utils": (f"{_OWN}.helpers",),
}
"""Module below ``bitsandbytes`` ("" is itself) -> the halfbyte modules in which its names are looked up, in order."""

_ALIASES = {
    "F": "functional",
    "adam": "optim.adam",
    "autograd._functions.F": "functional",
    "modules": "nn.modules",
    "nn.modules.bnb": "",
    "nn.parametrize.F": "functional",
    "optim.ademamix.F": "functional",
    "optim.optimizer.F": "functional",
}
"""Modules that bitsandbytes also offers under other names."""

_SWITCHBACK = (
    "StandardLinear",
    "SwitchBackLinear",
    "SwitchBackLinearBnb",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearVectorwise",
)

_ELSEWHERE: dict[str, dict[str, str]] = {
    "autograd._functions": {"supports_igemmlt": f"{_OWN}.legacy"},
    "": {"COMPILED_WITH_CUDA": f"{_OWN}.cextension", "_import_backends": f"{_OWN}.ops:load_backends"},
    "cextension": {
        **dict.fromkeys(("CUDASpecs", "get_cuda_specs", "get_cuda_version_tuple"), f"{_OWN}.cuda_specs"),
        "DYNAMIC_LIBRARY_SUFFIX": f"{_OWN}.consts",
        "PACKAGE_DIR": f"{_OWN}.consts",
    },
    "nn": dict.fromkeys(_SWITCHBACK, f"{_OWN}.research"),
    "nn.modules": {
        "GlobalOptimManager": "halfbyte.optim",
        "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING": f"{_OWN}.helpers",
        "OutlierTracer": f"{_OWN}.helpers",
        "QuantState": "halfbyte.functional",
        "T": f"{_OWN}.helpers:ModuleType",
        "has_avx512bf16": f"{_OWN}.legacy",
        "maybe_rearrange_weight": "halfbyte.nn.weight_formats",
        **dict.fromkeys(_SWITCHBACK, f"{_OWN}.research"),
    },
    "optim.optimizer": {"sync_gpu": f"{_OWN}.helpers"},
}
"""Single names that are found elsewhere than their module's others; after a colon their name there."""

_LOGGERS = frozenset({"autograd._functions", "cextension", "cuda_specs", "nn.modules", "optim.optimizer", "utils"})
"""Modules with a ``logger`` of their own name."""

_RETIRED_IN = {"autograd": "autograd._functions", "nn.modules": "functional"}
"""Where else a retired name may be listed: bitsandbytes imports some of them on."""


def is_there(module: str) -> bool:
    """Whether halfbyte has the modules that answer for ``bitsandbytes.<module>``.

    >>> is_there("nn.modules"), is_there("triton")
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
    whole = f"{module}.{name}".lstrip(".")
    inner = _ALIASES.get(whole, whole)
    if inner in MODULES and inner != "__main__" and is_there(inner):
        return importlib.import_module(f"bitsandbytes.{inner}".rstrip("."))
    if name.startswith("__"):
        raise AttributeError(missing(whole))
    if name == "logger" and module in _LOGGERS:
        return logging.getLogger(f"bitsandbytes.{module}")
    home, _, there = _ELSEWHERE.get(module, {}).get(name, "").partition(":")
    for place in (home,) if home else MODULES[module]:
        found = getattr(importlib.import_module(place), there or name, None) if _exists(place) else None
        if found is not None:
            return found
    listed = retired_name(module, name)
    if listed is not None:
        return stand_in(listed)
    raise AttributeError(missing(whole))


def retired_name(module: str, name: str) -> str | None:
    """The name under which ``bitsandbytes.<module>.<name>`` is listed as retired; None where it is not.

    >>> retired_name("autograd", "undo_layout"), retired_name("nn", "Linear4bit")
    ('autograd._functions.undo_layout', None)
    """
    places = (f"{place}.{name}".lstrip(".") for place in (module, _RETIRED_IN.get(module, module)))
    return next((place for place in places if place in RETIRED), None)


def missing(what: str) -> str:
    """The text for a part of bitsandbytes that halfbyte does not offer."""
    advice = advice_for_module(what)
    if advice is not None:
        return f"halfbyte offers no bitsandbytes.{what}\nhint: use {advice}"
    return (
        f"halfbyte {__version__} offers no bitsandbytes.{what}\n"
        "hint: `pip install -U halfbyte` if it is newer than yours; docs/compatibility.md lists what there is"
    )


def public_names(module: str) -> list[str]:
    """What ``dir`` and ``import *`` show of ``bitsandbytes.<module>``."""
    names: set[str] = set()
    for home in filter(_exists, MODULES[module]):
        found = importlib.import_module(home)
        names |= set(getattr(found, "__all__", None) or (n for n in vars(found) if not n.startswith("_")))
    prefix = f"{module}." if module else ""
    inner = {other.removeprefix(prefix) for other in MODULES if other.startswith(prefix) and other not in {"", module}}
    names |= {other for other in inner if "." not in other and other != "__main__" and is_there(prefix + other)}
    return sorted(names)
