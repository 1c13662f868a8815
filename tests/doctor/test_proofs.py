"""Proofs survive what the children do: a crash costs one step, a broken device its later ones, never another device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from halfbyte.doctor.children import Outcome, Request
from halfbyte.doctor.facts.gpu import Gpu, SmiGpu
from halfbyte.doctor.facts.proofs import BASIC, COMMON, Proofs, StepProof, proofs
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.facts.torch_import import TorchImport, torch_import
from halfbyte.doctor.host import Host
from tests.support.doctor_facts import H100

SEEN = TorchImport(ok=True, devices=(H100, replace(H100, name="cuda:1")))
Behaviour = Callable[[str, str, Request], dict[str, Any] | None]
"""Device, step and request -> the step's last event; None where the child dies in it."""


def good(value: float = 1e-7) -> dict[str, Any]:
    measured = {"name": "error", "value": value, "limit": 1e-6, "unit": "", "at_least": False}
    return {"state": "done", "seconds": 0.1, "measurements": [measured], "notes": ["a note"]}


def host_where(behave: Behaviour, requests: list[Request] | None = None, **changed: Any) -> Host:
    """A host whose device children report what ``behave`` says."""

    def probe(_: Host, request: Request) -> Outcome:
        if requests is not None:
            requests.append(request)
        events: list[dict[str, Any]] = []
        for step in request.arguments["steps"]:
            events.append({"event": "step", "step": step, "state": "start"})
            last = behave(request.arguments["device"], step, request)
            if last is None:
                return Outcome(tuple(events), "killed by SIGSEGV", "Fatal Python error: Segmentation fault")
            events.append({"event": "step", "step": step, **last})
            if last.get("text", "").startswith("CUDA error"):
                return Outcome(tuple(events))
            if step in BASIC and last["state"] == "error":
                rest = request.arguments["steps"][request.arguments["steps"].index(step) + 1 :]
                events += [
                    {"event": "step", "step": name, "state": "blocked", "text": f"{step} failed"} for name in rest
                ]
                return Outcome(tuple(events))
        return Outcome(
            (*events, {"event": "backends", "verdicts": [["fast", ""], ["other", "is absent"], ["reference", ""]]})
        )

    return Host(probe=probe, **changed)


def states(found: Proofs, device: str) -> dict[str, str]:
    return {name: step.state for proof in found.devices if proof.label == device for name, step in proof.steps.items()}


def test_every_device_and_the_cpu_are_proved():
    found = proofs(host_where(lambda *_: good()), SEEN)
    assert [proof.label for proof in found.devices] == ["cuda:0", "cuda:1", "cpu"]
    assert all(proof.verified for proof in found.devices)
    assert found.devices[0].backends == (("fast", ""), ("other", "is absent"), ("reference", ""))
    assert "triton_kernel" in found.devices[0].steps
    assert "numba_kernel" in found.devices[2].steps


def test_a_crash_costs_one_step_and_the_others_run_in_a_new_child():
    found = proofs(host_where(lambda device, step, _: None if (device, step) == ("cuda:1", "fp4") else good()), SEEN)
    assert states(found, "cuda:1") == {**dict.fromkeys(states(found, "cuda:1"), "done"), "fp4": "crash"}
    assert found.devices[1].steps["fp4"].text == "Fatal Python error: Segmentation fault"
    assert found.devices[0].verified
    assert found.devices[2].verified


def test_an_error_after_which_the_gpu_is_lost_to_that_process_costs_one_step():
    lost = {"state": "error", "text": "CUDA error: an illegal memory access was encountered", "seconds": 0.1}
    found = proofs(host_where(lambda _, step, __: lost if step == "nf4" else good()), TorchImport(ok=True))
    assert states(found, "cpu") == {**dict.fromkeys(states(found, "cpu"), "done"), "nf4": "error"}


def test_two_crashes_cost_two_steps():
    found = proofs(host_where(lambda _, step, __: None if step in {"nf4", "int8"} else good()), TorchImport(ok=True))
    assert [name for name, state in states(found, "cpu").items() if state == "crash"] == ["nf4", "int8"]


def test_a_device_that_dies_at_the_first_step_is_not_tried_further():
    requests: list[Request] = []
    host = host_where(lambda device, *_: None if device == "cuda:0" else good(), requests)
    found = proofs(host, SEEN)
    assert states(found, "cuda:0")["allocate"] == "crash"
    assert set(states(found, "cuda:0").values()) == {"crash", "blocked"}
    tried = [each.arguments["steps"] for each in requests if each.arguments["device"] == "cuda:0"]
    assert len(tried) == 2
    assert ["optimizer_8bit" in steps for steps in sorted(tried, key=len)] == [True, False]


def test_the_optimizer_has_a_child_of_its_own_because_its_import_is_slow():
    requests: list[Request] = []
    found = proofs(host_where(lambda *_: good(), requests), TorchImport(ok=True))
    alone, others = sorted((each.arguments["steps"] for each in requests), key=len)
    assert alone == [*BASIC, "optimizer_8bit"]
    assert [name for name in found.devices[0].steps if name not in others] == ["optimizer_8bit"]


def test_what_breaks_the_step_apart_leaves_the_others_reports_and_the_backends_alone():
    found = proofs(host_where(lambda _, step, __: None if step == "optimizer_8bit" else good()), TorchImport(ok=True))
    assert states(found, "cpu") == {**dict.fromkeys(states(found, "cpu"), "done"), "optimizer_8bit": "crash"}
    assert found.devices[0].backends

    def behave(_: str, step: str, request: Request) -> dict[str, Any] | None:
        return None if step == "allocate" and "nf4" not in request.arguments["steps"] else good()

    found = proofs(host_where(behave), TorchImport(ok=True))
    assert states(found, "cpu") == {**dict.fromkeys(states(found, "cpu"), "done"), "optimizer_8bit": "blocked"}


@pytest.mark.parametrize(("cores", "on_cpu"), [(1, "2"), (8, "2"), (16, "4")])
def test_children_share_the_cores_unless_the_user_has_chosen(cores: int, on_cpu: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    requests: list[Request] = []
    proofs(host_where(lambda *_: good(), requests), SEEN)
    threads = {(each.arguments["device"], each.changed["OMP_NUM_THREADS"]) for each in requests}
    assert threads == {("cuda:0", "2"), ("cuda:1", "2"), ("cpu", on_cpu)}
    requests.clear()
    proofs(host_where(lambda *_: good(), requests, environ={"OMP_NUM_THREADS": "7"}), SEEN)
    assert all("OMP_NUM_THREADS" not in each.changed for each in requests)


def test_the_full_level_measures_speed_with_all_cores_and_nothing_beside():
    requests: list[Request] = []
    found = proofs(host_where(lambda *_: good(), requests, full=True), TorchImport(ok=True))
    assert all("OMP_NUM_THREADS" not in each.changed for each in requests)
    assert len(requests) == len(found.devices)


def test_after_a_failed_basic_step_the_rest_is_blocked():
    error = {"state": "error", "text": "RuntimeError: no kernel image is available", "seconds": 0.1}
    found = proofs(host_where(lambda _, step, __: error if step == "torch_op" else good()), TorchImport(ok=True))
    assert {state for name, state in states(found, "cpu").items() if name not in BASIC} == {"blocked"}


def test_a_child_that_reports_nothing_is_a_crash_of_the_first_step():
    host = Host(probe=lambda *_: Outcome(ended="did not start: no memory"))
    found = proofs(host, TorchImport(ok=True))
    assert found.devices[0].steps["allocate"] == StepProof("crash", "did not start: no memory")
    assert found.devices[0].steps["nf4"].state == "blocked"


def test_wrong_numbers_are_traced_to_what_brings_them():
    def behave(_: str, step: str, request: Request) -> dict[str, Any]:
        return good(0.5 if step == "nf4" and "PYTHONPATH" not in request.without else 1e-7)

    found = proofs(host_where(behave, environ={"PYTHONPATH": "/x"}), TorchImport(ok=True))
    step = found.devices[0].steps["nf4"]
    assert not step.ok
    assert step.culprit is not None
    assert step.culprit.name == "PYTHONPATH"


def test_only_the_steps_that_are_looked_at_run():
    requests: list[Request] = []
    proofs(host_where(lambda *_: good(), requests, steps=frozenset({"fp4"})), TorchImport(ok=True))
    assert requests[0].arguments["steps"] == [*BASIC, "fp4"]


def test_the_full_level_proves_each_backend_that_serves():
    requests: list[Request] = []

    def behave(_: str, step: str, request: Request) -> dict[str, Any]:
        if request.changed.get("HALFBYTE_BACKEND") == "fast" and step == "int8":
            return {"state": "error", "text": "UnsupportedError: no backend computes it", "seconds": 0.1}
        return good()

    found = proofs(host_where(behave, requests, full=True), TorchImport(ok=True))
    assert [proof.label for proof in found.devices] == ["cpu", "cpu (fast)", "cpu (reference)"]
    assert states(found, "cpu (fast)") == {**dict.fromkeys(COMMON, "done"), "int8": "skip"}
    assert "bandwidth" in states(found, "cpu")
    assert all(request.arguments["thorough"] for request in requests)


def test_without_torch_nothing_is_started():
    requests: list[Request] = []
    assert proofs(host_where(lambda *_: good(), requests), TorchImport()).devices == ()
    assert requests == []


# The import


IMPORTED = {"event": "imported", "seconds": 2.0, "version": "2.13.0", "file": "/site/torch/__init__.py"}
GPU = Gpu(driver="580.95.05", smi=(SmiGpu("NVIDIA H100", 81559, 0, (9, 0)),))
BUILD = TorchBuild("2.13.0+cu130", cuda="13.0", file="/site/torch/__init__.py")
DEVICE = {"event": "device", "name": "cuda:0", "model": "NVIDIA H100", "capability": [9, 0], "memory": 85_000_000_000}


def test_devices_are_read():
    host = Host(probe=lambda *_: Outcome((IMPORTED, {"event": "cuda", "available": True, "arches": ["sm_90"]}, DEVICE)))
    found = torch_import(host, BUILD, GPU)
    assert (found.ok, found.available, found.arches) == (True, True, ("sm_90",))
    assert [(device.name, device.capability) for device in found.devices] == [("cuda:0", (9, 0))]


def test_a_mask_that_hides_the_gpus_is_found_by_unsetting_it():
    def probe(_: Host, request: Request) -> Outcome:
        events = (IMPORTED, {"event": "cuda", "available": False})
        return Outcome((*events, DEVICE) if "CUDA_VISIBLE_DEVICES" in request.without else events)

    found = torch_import(Host(probe=probe, environ={"CUDA_VISIBLE_DEVICES": "7"}), BUILD, GPU)
    assert found.ok
    assert found.devices == ()
    assert found.mask_culprit is not None
    assert found.mask_culprit.name == "CUDA_VISIBLE_DEVICES"


def test_a_crash_while_looking_for_devices_is_kept_apart_from_the_import():
    host = Host(probe=lambda *_: Outcome((IMPORTED,), "killed by SIGSEGV", "Fatal Python error: Segmentation fault"))
    found = torch_import(host, BUILD, GPU)
    assert found.ok
    assert found.cuda_error == "while looking for devices: Fatal Python error: Segmentation fault"


def test_torch_that_is_not_there_is_not_tried():
    host = Host(probe=lambda *_: (_ for _ in ()).throw(AssertionError("a child was started")))
    assert torch_import(host, TorchBuild(), GPU).error == "torch is not installed"
