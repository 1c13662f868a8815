"""``bitsandbytes.cuda_specs``: what torch knows about the CUDA or ROCm devices here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "CUDASpecs",
    "get_compute_capabilities",
    "get_cuda_specs",
    "get_cuda_version_string",
    "get_cuda_version_tuple",
    "get_rocm_gpu_arch",
]


@dataclass(frozen=True)
class CUDASpecs:
    """Highest compute capability of the devices, and torch's CUDA version as ``"124"`` and as ``(12, 4)``."""

    highest_compute_capability: tuple[int, int]
    cuda_version_string: str
    cuda_version_tuple: tuple[int, int]

    @property
    def has_imma(self) -> bool:
        """Whether there are int8 tensor cores (compute capability 7.5)."""
        return torch.version.hip is not None or self.highest_compute_capability >= (7, 5)


def get_compute_capabilities() -> list[tuple[int, int]]:
    """Compute capability of every device, rising."""
    return sorted(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))


def get_cuda_version_tuple() -> tuple[int, int] | None:
    """Major and minor version of the CUDA or HIP that torch was built with."""
    version = torch.version.hip or torch.version.cuda
    if version is None:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def get_cuda_version_string() -> str | None:
    """The same as ``"124"``."""
    version = get_cuda_version_tuple()
    return None if version is None else f"{version[0]}{version[1]}"


def get_cuda_specs() -> CUDASpecs | None:
    """The facts of this machine; None without a usable device."""
    version, text = get_cuda_version_tuple(), get_cuda_version_string()
    if version is None or text is None or not torch.cuda.is_available():
        return None
    return CUDASpecs(get_compute_capabilities()[-1], text, version)


def get_rocm_gpu_arch() -> str:
    """Architecture of the first ROCm device, such as ``"gfx942"``; ``"unknown"`` without one."""
    if torch.version.hip is None or not torch.cuda.is_available():
        return "unknown"
    return str(torch.cuda.get_device_properties(0).gcnArchName).split(":")[0]
