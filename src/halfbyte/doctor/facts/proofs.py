"""What was computed on every device, in child processes: steps, their numbers, where one crashed or hung."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from halfbyte.doctor.children import Outcome, Request
from halfbyte.doctor.differential import Culprit, find_culprit
from halfbyte.doctor.facts.torch_import import Device, TorchImport
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Measurement
from halfbyte.doctor.probes.steps import STEPS
from halfbyte.doctor.registry import fact

__all__ = ["BASIC", "DeviceProof", "Proofs", "StepProof", "proofs"]

BASIC = tuple(name for name, step in STEPS.items() if step.basic)
FULL = tuple(name for name, step in STEPS.items() if step.full)
COMPILERS = {"triton_kernel", "numba_kernel"}
COMMON = tuple(name for name in STEPS if name not in {*BASIC, *FULL, *COMPILERS})
APART = tuple(name for name, step in STEPS.items() if step.apart)
TIMEOUT = 120.0
MOST_AT_ONCE = 8


@dataclass(frozen=True)
class StepProof:
    """One step on one device.

    Attributes:
        state: ``"done"``, ``"skip"``, ``"error"`` (an exception), ``"crash"`` (the child died) or ``"blocked"``.
        text: The error or reason.
        measurements: Its numbers.
        notes: Remarks.
        culprit: What breaks it; None where taking nothing away helps, or it works.
        seconds: Time it took.
    """

    state: str
    text: str = ""
    measurements: tuple[Measurement, ...] = ()
    notes: tuple[str, ...] = ()
    culprit: Culprit | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Done, and every number within its limit."""
        return self.state == "done" and all(each.ok for each in self.measurements)


@dataclass(frozen=True)
class DeviceProof:
    """All steps on one device.

    Attributes:
        device: Which.
        steps: By name, in the order they ran.
        backends: Backends that serve it, and why not for those that do not (empty: serves), best first.
        forced: The backend that was forced; empty where the registry chose.
    """

    device: Device
    steps: Mapping[str, StepProof] = field(default_factory=dict[str, StepProof])
    backends: tuple[tuple[str, str], ...] = ()
    forced: str = ""

    @property
    def label(self) -> str:
        """Device, and the backend where one was forced."""
        return self.device.name + (f" ({self.forced})" if self.forced else "")

    @property
    def verified(self) -> bool:
        """Whether nothing failed and something was computed."""
        states = [step for step in self.steps.values() if step.state != "skip"]
        return bool(states) and all(step.ok for step in states)


@dataclass(frozen=True)
class Proofs:
    """Every device; at the full level each backend of a device as well."""

    devices: tuple[DeviceProof, ...] = ()

    @property
    def chosen(self) -> tuple[DeviceProof, ...]:
        """One a device, with the backends that the registry chooses."""
        return tuple(proof for proof in self.devices if not proof.forced)


@fact(slow=True)
def proofs(host: Host, torch_import: TorchImport) -> Proofs:
    """Compute on the CPU and on every GPU that torch sees, a child process each."""
    if not torch_import.ok:
        return Proofs()
    devices = [*torch_import.devices, Device("cpu")]
    with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
        made = list(pool.map(lambda device: _prove(host, device), devices))
        if host.full:
            pairs = [(proof.device, name) for proof in made for name, reason in proof.backends if not reason]
            made += pool.map(lambda pair: _prove(host, pair[0], pair[1]), pairs)
    return Proofs(tuple(made))


def _steps(device: Device, full: bool) -> list[str]:
    compiler: list[str] = {"cpu": ["numba_kernel"], "mps": []}.get(device.name, ["triton_kernel"])
    return [*BASIC, *compiler, *COMMON, *(FULL if full else ())]


def _prove(host: Host, device: Device, backend: str = "") -> DeviceProof:
    names = list(COMMON) if backend else _steps(device, host.full)
    names = [name for name in names if name in BASIC or host.steps is None or name in host.steps]
    changed = {"HALFBYTE_BACKEND": backend} if backend else {}
    if "OMP_NUM_THREADS" not in host.environ and not host.full:  # the full level measures speed, with all cores
        changed["OMP_NUM_THREADS"] = str(_threads(device))
    request = Request(
        "device",
        {"device": device.name, "steps": names, "thorough": host.full},
        TIMEOUT * (3 if host.full else 1),
        changed=changed,
    )
    apart = () if host.full else APART  # nothing runs beside what is timed
    parts = [[name for name in names if name not in apart]]
    if any(name in apart for name in names):
        parts.append([name for name in names if name in BASIC or name in apart])
    with ThreadPoolExecutor(len(parts)) as pool:
        ran = list(pool.map(lambda steps: _run_steps(host, request, device, steps), parts))
    backends = next((verdicts for _, verdicts in ran if verdicts), ())
    together: dict[str, StepProof] = {}
    for steps, _ in reversed(ran):  # of a step that ran twice, the first part's report stands
        together.update(steps)
    found = {name: _without_absence(together[name], backend) for name in names}
    if not backend:
        found = _accuse(host, request, device, found)
    return DeviceProof(device, found, backends, backend)


def _threads(device: Device) -> int:
    """CPU threads of a child: those that each take all cores wait for each other."""
    return max(2, (os.cpu_count() or 2) // 4) if device.name == "cpu" else 2


def _run_steps(
    host: Host, request: Request, device: Device, names: list[str]
) -> tuple[dict[str, StepProof], tuple[tuple[str, str], ...]]:
    """Run steps in a child, and what a crash left over in further ones; their reports and the backends' verdicts."""
    found: dict[str, StepProof] = {}
    backends: tuple[tuple[str, str], ...] = ()
    left = names
    while left:
        outcome = host.probe(host, replace(request, arguments={**request.arguments, "steps": left}))
        found.update(_read(outcome, device, left))
        backends = tuple((name, reason) for name, reason in outcome.event("backends").get("verdicts", ())) or backends
        left = _after_crash(left, found)
    return found, backends


def _read(outcome: Outcome, device: Device, names: list[str]) -> dict[str, StepProof]:
    """Steps that were reported; one that only started is the crash."""
    found: dict[str, StepProof] = {}
    for event in outcome.events:
        if event.get("event") == "step":
            found[str(event["step"])] = _step(event, device, outcome)
    if not found:  # it died before the first step
        found[names[0]] = StepProof("crash", outcome.error_text or outcome.ended or "the child reported nothing")
    return found


def _step(event: Mapping[str, Any], device: Device, outcome: Outcome) -> StepProof:
    if event["state"] == "start":
        return StepProof("crash", outcome.error_text or outcome.ended)
    measured = tuple(
        Measurement(device.name, each["name"], each["value"], each["limit"], each["unit"], each["at_least"])
        for each in event.get("measurements", ())
    )
    return StepProof(
        str(event["state"]),
        str(event.get("text", "")),
        measured,
        tuple(str(note) for note in event.get("notes", ())),
        seconds=float(event.get("seconds", 0.0)),
    )


def _after_crash(names: list[str], found: dict[str, StepProof]) -> list[str]:
    """Steps that a new child has to run because the last one ended in one before them."""
    left = [name for name in names if name not in found]
    dead = next((name for name in BASIC if name in names and name in found and found[name].state == "crash"), "")
    if dead:
        found.update({name: StepProof("blocked", f"{dead} failed before") for name in left})
        return []
    return left


def _without_absence(step: StepProof, backend: str) -> StepProof:
    """A forced backend that leaves an op to others is not an error."""
    if backend and step.state == "error" and step.text.startswith("UnsupportedError"):
        return StepProof("skip", f"{backend} leaves this to another backend")
    return step


def _accuse(host: Host, request: Request, device: Device, found: dict[str, StepProof]) -> dict[str, StepProof]:
    """Look for what breaks the first failing step."""
    bad = next((name for name, step in found.items() if step.state in {"error", "crash"} or _wrong(step)), "")
    if not bad:
        return found
    steps = [*BASIC, bad] if bad not in BASIC else [bad]
    alone = replace(request, arguments={**request.arguments, "steps": steps})
    culprit, _ = find_culprit(host, alone, works=_works(device, bad, steps))
    return {**found, bad: replace(found[bad], culprit=culprit)}


def _wrong(step: StepProof) -> bool:
    return step.state == "done" and not step.ok


def _works(device: Device, name: str, steps: list[str]) -> Callable[[Outcome], bool]:
    return lambda outcome: _read(outcome, device, steps).get(name, StepProof("blocked")).ok
