"""What transformers, peft and others remember about bitsandbytes, and how they are told that it is there now."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from halfbyte.integrations.post_import import after_import

__all__ = ["refresh", "watch"]

CACHED = (
    ("transformers.utils.import_utils", "is_bitsandbytes_available"),
    ("peft.import_utils", "is_bnb_available"),
    ("peft.import_utils", "is_bnb_4bit_available"),
)
"""Functions that cache their answer (module, name)."""

IMPORTED = (
    ("diffusers.quantizers.bitsandbytes.utils", "bnb"),
    ("peft.helpers", "bnb"),
    ("transformers.integrations.bitsandbytes", "bnb"),
    ("trl.experimental.online_dpo.online_dpo_trainer", "bnb"),
    ("trl.generation.vllm_generation", "bnb"),
)
"""Globals that hold bitsandbytes, or nothing where it was not there at their import (module, name)."""

LIBRARIES = frozenset({"accelerate", "diffusers", "peft", "transformers", "trl"})
"""Packages searched for modules that still hold another bitsandbytes."""


def refresh(version: str) -> None:
    """Make loaded libraries see this version of bitsandbytes. Loads none of them."""
    for module, name in CACHED:
        clear = getattr(getattr(sys.modules.get(module), name, None), "cache_clear", None)
        if clear is not None:
            clear()
    # diffusers, and transformers before version 5, looked once, at their import.
    for name in ("diffusers", "transformers"):
        looked = vars(sys.modules.get(f"{name}.utils.import_utils", ModuleType("none")))
        if "_bitsandbytes_available" in looked:
            looked.update(_bitsandbytes_available=True, _bitsandbytes_version=version)
    _renew_globals()
    _renew_peft_layers()


def watch() -> None:
    """Add what halfbyte adds to transformers, peft and diffusers as soon as they are loaded."""
    after_import("transformers.quantizers.auto", _extend_quantizers)
    after_import("peft.tuners.lora.layer", _extend_peft_experts)
    after_import("transformers.utils.quantization_config", _extend_config)
    after_import("peft.tuners.lora.bnb", _extend_lora)
    after_import("peft.tuners.randlora.bnb", _extend_randlora)
    after_import("peft.utils.loftq_utils", _extend_loftq)
    after_import("diffusers.quantizers.bitsandbytes.bnb_quantizer", _extend_diffusers)


def _extend_peft_experts() -> None:
    importlib.import_module("halfbyte.integrations.peft_experts").extend()


def _extend_quantizers() -> None:
    importlib.import_module("halfbyte.integrations.transformers")


def _extend_config() -> None:
    config = sys.modules["transformers.utils.quantization_config"].BitsAndBytesConfig
    if not hasattr(config.__init__, "__wrapped__"):
        importlib.import_module("halfbyte.integrations.transformers_embeddings").extend_config(config)


def _extend_lora() -> None:
    importlib.import_module("halfbyte.integrations.peft_lora").extend()


def _extend_randlora() -> None:
    importlib.import_module("halfbyte.integrations.peft").extend_randlora()


def _extend_loftq() -> None:
    importlib.import_module("halfbyte.integrations.peft").extend_loftq()


def _extend_diffusers() -> None:
    importlib.import_module("halfbyte.integrations.diffusers")


def _renew_globals() -> None:
    for module, name in IMPORTED:
        if module in sys.modules and getattr(sys.modules[module], name, None) is None:
            setattr(sys.modules[module], name, importlib.import_module("bitsandbytes"))
    for module in list(sys.modules.values()):
        if str(getattr(module, "__name__", "")).partition(".")[0] not in LIBRARIES:
            continue
        for name in ("bnb", "bitsandbytes"):
            held = vars(module).get(name)
            if getattr(held, "__name__", "") == "bitsandbytes" and held is not sys.modules.get("bitsandbytes"):
                setattr(module, name, importlib.import_module("bitsandbytes"))


def _renew_peft_layers() -> None:
    # These define their layers at import, and only where bitsandbytes was there then.
    for name in sorted(sys.modules):
        if name.startswith("peft.tuners.") and name.endswith(".bnb"):
            module = sys.modules[name]
            if not any("Linear4bit" in public for public in vars(module)):
                importlib.reload(module)
                if name == "peft.tuners.randlora.bnb":
                    _extend_randlora()
