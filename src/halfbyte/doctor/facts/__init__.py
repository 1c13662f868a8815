"""What is true of this machine: one module a subject; each fact is gathered once, from a host that can be replaced."""

from halfbyte.doctor.facts import (
    cpu,
    gpu,
    installer,
    loader,
    memory,
    packages,
    peer,
    proofs,
    toolchain,
    torch_build,
    torch_import,
    transformers,
)

__all__ = [
    "cpu",
    "gpu",
    "installer",
    "loader",
    "memory",
    "packages",
    "peer",
    "proofs",
    "toolchain",
    "torch_build",
    "torch_import",
    "transformers",
]
