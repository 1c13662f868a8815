"""``bitsandbytes.cextension``: halfbyte has no compiled library, and says so to whoever asks for its functions."""

from __future__ import annotations

from typing import NoReturn

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.integrations.bitsandbytes.cuda_specs import get_rocm_gpu_arch

__all__ = ["BNB_BACKEND", "HIP_ENVIRONMENT", "BNBNativeLibrary", "NoLibrary", "get_native_library", "lib"]

HIP_ENVIRONMENT = torch.version.hip is not None
"""Whether torch was built for ROCm."""

BNB_BACKEND = "ROCm" if HIP_ENVIRONMENT else "CUDA" if torch.version.cuda else "XPU" if torch.version.xpu else "CPU"
"""What torch was built for."""


class NoLibrary:
    """Stands where bitsandbytes has its shared library.

    >>> lib.cquantize_blockwise_fp32
    Traceback (most recent call last):
        ...
    halfbyte.errors.UnsupportedError: lib.cquantize_blockwise_fp32: halfbyte has no compiled library; expected ...
    hint: `python -m halfbyte` shows which backends serve this machine
    """

    compiled_with_cuda = False

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedError(
            f"lib.{name}: halfbyte has no compiled library",
            expected="the functions of bitsandbytes.functional, which do the same on every device",
            hint="`python -m halfbyte` shows which backends serve this machine",
        )


lib = NoLibrary()
BNBNativeLibrary = NoLibrary


def get_native_library() -> NoLibrary:
    """What stands in the place of a library."""
    return lib


def __getattr__(name: str) -> str | bool:
    # Asking for it initialises the GPU, which an import must not do.
    if name == "ROCM_GPU_ARCH":
        return get_rocm_gpu_arch()
    if name == "COMPILED_WITH_CUDA":  # up to 0.43: whether the GPU can be used
        return torch.cuda.is_available()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
