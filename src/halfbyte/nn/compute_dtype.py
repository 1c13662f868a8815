"""Which dtype a quantized product is computed in when the user names none."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compute_dtype_for", "cpu_has_native_bf16", "default_compute_dtype"]


def compute_dtype_for(x: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """The dtype of a product with ``x``: what was asked for, a 16-bit input's own, or the device's default.

    >>> compute_dtype_for(torch.zeros(1, dtype=torch.float16), None)
    torch.float16
    """
    if asked is not None:
        return asked
    return x.dtype if x.dtype in (torch.bfloat16, torch.float16) else default_compute_dtype(x.device)


def default_compute_dtype(device: torch.device) -> torch.dtype:
    """The fastest dtype that ``device`` multiplies natively without losing range or, without one, fp32.

    CUDA: bf16 from compute capability 8.0, fp16 below. CPU: bf16 with AVX512-BF16, AMX or Arm's bf16, else fp32
    (there 16-bit products are emulated). XPU, MPS and others: bf16, fp16, fp32 in this order as torch offers them.

    >>> default_compute_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)
    True
    """
    if device.type == "cuda":
        if torch.version.hip is not None:
            return torch.bfloat16
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_native_bf16() else torch.float32
    if device.type == "mps":
        return torch.float16
    return torch.bfloat16 if device.type in {"xpu", "hpu", "npu"} else torch.float32


def cpu_has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware, as torch sees it."""
    return _CPU_HAS_NATIVE_BF16


def _probe_cpu() -> bool:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        probe = getattr(torch.cpu, name, None)
        if probe is not None and probe():
            return True
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("bf16", False))


# Asked once at import: torch.compile cannot trace the question.
_CPU_HAS_NATIVE_BF16 = _probe_cpu()
