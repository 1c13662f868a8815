"""Whether this machine's GPUs can run the Triton backend. Imports no Triton: the registry asks before it loads that."""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["why_not"]

OLDEST = (7, 5)
"""The oldest NVIDIA compute capability that Triton compiles these kernels for."""


def why_not() -> str | None:
    """Why the GPUs of this machine cannot be served, else None. Asked at the first use of a GPU, not at import."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None:
        return None
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST:
            name = torch.cuda.get_device_name(index)
            return f"{name} has compute capability {capability[0]}.{capability[1]}, Triton needs 7.5"
    return None
