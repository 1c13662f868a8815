"""What must hold: one function a check, one module a layer. Importing this package registers them all."""

from halfbyte.doctor.checks import (
    cpu,
    environment,
    gpu,
    huggingface,
    memory,
    numerics,
    python,
    speed,
    torch_build,
    torch_import,
    triton,
)

__all__ = [
    "cpu",
    "environment",
    "gpu",
    "huggingface",
    "memory",
    "numerics",
    "python",
    "speed",
    "torch_build",
    "torch_import",
    "triton",
]
