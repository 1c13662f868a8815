"""Whether this machine's GPUs can run the Triton backend. Imports no Triton: the registry asks before it loads that."""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["why_not", "why_not_on"]

OLDEST = (7, 5)
"""The oldest NVIDIA compute capability that Triton compiles these kernels for."""


def why_not() -> str | None:
    """Why none of this machine's GPUs can be served, else None. Asked at the first use of a GPU, not at import."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    reasons = [why_not_on(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    return None if None in reasons else "; ".join(dict.fromkeys(reason for reason in reasons if reason))


def why_not_on(device: torch.device) -> str | None:
    """Why that GPU cannot be served, else None: an old one may stand beside a new one."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {capability[0]}.{capability[1]}, Triton needs {OLDEST[0]}.{OLDEST[1]}"
