"""What a child process reports of transformers: whether it imports, and what it says of bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.doctor.children import Request
from halfbyte.doctor.facts.packages import Packages
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.host import Host
from halfbyte.doctor.registry import fact

__all__ = ["TransformersImport", "transformers_import"]


@dataclass(frozen=True)
class TransformersImport:
    """What the child reported.

    Attributes:
        tried: transformers and torch are installed, so it was tried.
        ok: The quantization parts of transformers import.
        error: Why not.
        quantizer: Why transformers' 4-bit quantizer refuses; empty where it does not.
        compute_dtype: ``bnb_4bit_compute_dtype`` of a config that does not name one.
    """

    tried: bool = False
    ok: bool = False
    error: str = ""
    quantizer: str = ""
    compute_dtype: str = ""


@fact(slow=True)
def transformers_import(host: Host, packages: Packages, torch_build: TorchBuild) -> TransformersImport:
    """Import transformers in a child and ask its quantizer whether it would run."""
    if not packages.version("transformers") or not torch_build.file:
        return TransformersImport()
    outcome = host.probe(host, Request("transformers_quantizer", timeout=60.0))
    config, quantizer = outcome.event("config"), outcome.event("quantizer")
    if not config:
        return TransformersImport(True, False, outcome.error_text or outcome.ended)
    problem = str(quantizer.get("error", "")) or ("" if outcome.ok else outcome.error_text)
    return TransformersImport(True, True, "", problem, str(config.get("compute_dtype", "")))
