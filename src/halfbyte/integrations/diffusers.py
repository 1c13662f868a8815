"""What halfbyte adds to diffusers' bitsandbytes quantizers: they work on machines without a GPU.

Importing this module changes the two quantizer classes in place; ``libraries.watch`` does it at the right time.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.quantizers.bitsandbytes import bnb_quantizer  # pyright: ignore[reportMissingImports]

__all__ = ["extend"]


def _has_gpu() -> bool:
    return torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()


def extend(quantizer: Any) -> None:
    """Let a quantizer class go on where there is no GPU; where there is one, nothing changes."""
    validate, update, dequantize = quantizer.validate_environment, quantizer.update_device_map, quantizer._dequantize

    def validate_environment(self: Any, *args: Any, **kwargs: Any) -> None:
        if _has_gpu():
            validate(self, *args, **kwargs)

    def update_device_map(self: Any, device_map: Any) -> Any:
        return {"": "cpu"} if device_map is None and not _has_gpu() else update(self, device_map)

    def _dequantize(self: Any, model: Any) -> Any:
        if _has_gpu():
            return dequantize(self, model)
        from diffusers.quantizers.bitsandbytes.utils import (  # pyright: ignore[reportMissingImports]
            dequantize_and_replace,
        )

        return dequantize_and_replace(model, self.modules_to_not_convert, quantization_config=self.quantization_config)

    quantizer.validate_environment = validate_environment
    quantizer.update_device_map = update_device_map
    quantizer._dequantize = _dequantize


for _name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
    extend(getattr(bnb_quantizer, _name))
