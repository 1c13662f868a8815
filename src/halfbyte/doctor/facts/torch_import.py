"""What a child process reports of ``import torch``: whether it works, which devices it sees, who breaks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from halfbyte.doctor.children import Outcome, Request
from halfbyte.doctor.differential import Culprit, find_culprit
from halfbyte.doctor.facts.gpu import Gpu
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.host import Host
from halfbyte.doctor.registry import fact

__all__ = ["Device", "TorchImport", "torch_import"]


@dataclass(frozen=True)
class Device:
    """One device that torch can compute on.

    Attributes:
        name: ``"cuda:0"``, ``"xpu:0"``, ``"mps"``, ``"cpu"``.
        model: ``"NVIDIA H100 80GB HBM3"``.
        capability: Compute capability; (0, 0) where there is none.
        memory: Bytes; 0 where not known.
        bf16: ``"native"``, ``"emulated"`` or ``"no"``.
    """

    name: str
    model: str = ""
    capability: tuple[int, int] = (0, 0)
    memory: int = 0
    bf16: str = "native"

    @property
    def label(self) -> str:
        """Name and model."""
        return f"{self.name} {self.model}".strip()


@dataclass(frozen=True)
class TorchImport:
    """What the child reported.

    Attributes:
        ok: The import worked.
        error: The line that says most of why not.
        ended: How the child ended, where it did not end by itself.
        trace: Last lines of its error stream.
        culprit: What breaks it; None where taking nothing away helps.
        seconds: Time the import took.
        version: What the module says.
        file: Where it came from.
        available: ``torch.cuda.is_available()``.
        cuda_error: What CUDA says where it is not available, or the device list cannot be made.
        arches: Architectures of the build, ``("sm_80", ..., "compute_90")``.
        devices: GPUs that it sees.
        cuda_at_import: Importing halfbyte initialised CUDA; None where that could not be asked.
        halfbyte_error: Why halfbyte's ops cannot be imported; empty where they can.
        numpy_error: Why tensors and NumPy arrays cannot be exchanged; empty where they can.
        warnings: Texts that torch warned of.
        mapped: Loaded CUDA libraries by name, more than one place for one loaded twice.
        mask_culprit: The variable that hides every GPU, found by unsetting it; None for none.
    """

    ok: bool = False
    error: str = ""
    ended: str = ""
    trace: tuple[str, ...] = ()
    culprit: Culprit | None = None
    seconds: float = 0.0
    version: str = ""
    file: str = ""
    available: bool = False
    cuda_error: str = ""
    arches: tuple[str, ...] = ()
    devices: tuple[Device, ...] = ()
    cuda_at_import: bool | None = None
    halfbyte_error: str = ""
    numpy_error: str = ""
    warnings: tuple[str, ...] = ()
    mapped: tuple[tuple[str, tuple[str, ...]], ...] = ()
    mask_culprit: Culprit | None = None


@fact(slow=True)
def torch_import(host: Host, torch_build: TorchBuild, gpu: Gpu) -> TorchImport:
    """Import torch in a child; where that fails, find out what breaks it."""
    if not torch_build.file:
        return TorchImport(error="torch is not installed")
    request = Request("import_torch", timeout=60.0)
    outcome = host.probe(host, request)
    if not outcome.event("imported"):
        culprit, _ = find_culprit(host, request, lambda again: bool(again.event("imported")))
        return _failed(outcome, culprit)
    mask = None
    if torch_build.accelerated and gpu.reachable and not outcome.event("device"):
        mask, _ = find_culprit(host, request, lambda again: bool(again.event("device")))
    return _read(outcome, mask)


def _failed(outcome: Outcome, culprit: Culprit | None) -> TorchImport:
    return TorchImport(
        error=outcome.error_text or outcome.ended, ended=outcome.ended, trace=outcome.telling_lines, culprit=culprit
    )


def _read(outcome: Outcome, mask: Culprit | None) -> TorchImport:
    imported, cuda = outcome.event("imported"), outcome.event("cuda")
    ours, bridge = outcome.event("halfbyte"), outcome.event("numpy")
    unfinished = "" if outcome.ok else f"while looking for devices: {outcome.error_text or outcome.ended}"
    return TorchImport(
        ok=True,
        ended=outcome.ended,
        seconds=float(imported.get("seconds", 0.0)),
        version=str(imported.get("version", "")),
        file=str(imported.get("file", "")),
        available=bool(cuda.get("available")),
        cuda_error=str(cuda.get("error", "")) or unfinished,
        arches=tuple(cuda.get("arches", ())),
        devices=tuple(_device(event) for event in outcome.events if event.get("event") == "device"),
        cuda_at_import=ours.get("cuda_initialized"),
        halfbyte_error=str(ours.get("error", "")),
        numpy_error=str(bridge.get("error", "")),
        warnings=tuple(cuda.get("warnings", ())),
        mapped=tuple((name, tuple(places)) for name, places in outcome.event("mapped").get("libraries", {}).items()),
        mask_culprit=mask,
    )


def _device(event: dict[str, Any]) -> Device:
    major, minor = event.get("capability", (0, 0))
    return Device(
        str(event["name"]),
        str(event.get("model", "")),
        (int(major), int(minor)),
        int(event.get("memory", 0)),
        str(event.get("bf16", "native")),
    )
