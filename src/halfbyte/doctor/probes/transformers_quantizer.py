"""Imports transformers' quantization and asks its 4-bit quantizer; halfbyte stands in where bitsandbytes is not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

__all__ = ["run"]


def run(arguments: dict[str, Any], emit: Callable[..., None]) -> None:
    """Emit ``config`` and ``quantizer``."""
    del arguments
    if importlib.util.find_spec("bitsandbytes") is None and importlib.util.find_spec(
        "halfbyte.integrations.bitsandbytes"
    ):
        import halfbyte

        halfbyte.install_as_bitsandbytes()
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True)
    emit("config", compute_dtype=str(config.bnb_4bit_compute_dtype))
    if importlib.util.find_spec("bitsandbytes") is None:
        emit("quantizer", error="")
        return
    try:
        from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

        Bnb4BitHfQuantizer(config, pre_quantized=False).validate_environment(device_map="cpu")
    except Exception as error:
        emit("quantizer", error=f"{type(error).__name__}: {error}")
    else:
        emit("quantizer", error="")
