"""A case: one way to break one thing; facts that several cases break, and machines that several have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from halfbyte.doctor.facts.gpu import SmiGpu
from halfbyte.doctor.facts.peer import Peer
from halfbyte.doctor.facts.proofs import Proofs, StepProof
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.facts.torch_import import Device, TorchImport
from halfbyte.doctor.model import Measurement, Status
from tests.support.doctor_facts import H100, proof_of

FAIL, WARN = Status.FAIL, Status.WARN
T4 = Device("cuda:0", "Tesla T4", (7, 5), 15 << 30, "emulated")
GB10 = SmiGpu("NVIDIA GB10", 122880, 0, (12, 1))
PEER = Peer("0.50.2", "/site/bitsandbytes", ("11.8", "12.8", "13.0"), (), True, "libbitsandbytes_cuda130.so")
CPU_BUILD = {"torch_build": TorchBuild("2.13.0+cpu", file="/site/torch/__init__.py")}


@dataclass(frozen=True)
class Case:
    """One way to break one thing.

    Attributes:
        name: Failure class, with a letter where there are several ways.
        code: The check that must speak.
        broken: Fact -> its changed attributes, or another fact.
        fix: Part of a command that must be offered.
        status: How serious it is.
        healthy: As ``broken``, where the healthy machine lacks what the check looks at.
    """

    name: str
    code: str
    broken: dict[str, Any]
    fix: str
    status: Status = FAIL
    healthy: dict[str, Any] = field(default_factory=dict)

    @property
    def failure_class(self) -> str:
        return self.name.split("-")[0]


def broken_import(error: str, **more: Any) -> dict[str, Any]:
    return {"torch_import": TorchImport(ok=False, error=error, ended="exit status 1", **more)}


def no_gpu_seen(error: str, **more: Any) -> dict[str, Any]:
    return {"torch_import": {"devices": (), "available": False, "cuda_error": error, **more}}


def step(name: str, text: str, state: str = "error") -> dict[str, Any]:
    return {"proofs": Proofs((proof_of(H100, **{name: StepProof(state, text)}),))}


def wrong_number(name: str) -> dict[str, Any]:
    bad = StepProof("done", measurements=(Measurement("cuda:0", name, 0.01, 1e-6),))
    return {"proofs": Proofs((proof_of(H100, **{name: bad}),))}
