"""The program of the device children: what it emits when a step fails, is absent, or loses the GPU."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.doctor.probes import device
from halfbyte.doctor.probes.steps import STEPS, Report, Skip, Step


def run(monkeypatch: pytest.MonkeyPatch, **steps: Any) -> list[tuple[str, str]]:
    """Step and state of all events, where each step does what is given: a report, or an exception to raise."""

    def act(self: Step, where: str, thorough: bool) -> Report:
        result = steps[self.function]
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(Step, "run", act)
    for name in steps:
        monkeypatch.setitem(STEPS, name, Step("anywhere", name, basic=name.startswith("basic")))
    events: list[dict[str, Any]] = []
    request = {"device": "cpu", "steps": list(steps)}
    device.run(request, lambda event, **values: events.append({"event": event, **values}))
    ends = [event for event in events if event["event"] == "step" and event["state"] != "start"]
    return [(event["step"], event["state"]) for event in ends]


def test_an_error_stays_with_its_step(monkeypatch: pytest.MonkeyPatch):
    states = run(monkeypatch, one=Report(), two=ValueError("no"), three=Skip("absent"), four=Report())
    assert states == [("one", "done"), ("two", "error"), ("three", "skip"), ("four", "done")]


def test_after_a_basic_step_the_rest_is_blocked(monkeypatch: pytest.MonkeyPatch):
    assert run(monkeypatch, basic=ValueError("no"), two=Report()) == [("basic", "error"), ("two", "blocked")]


def test_a_lost_gpu_ends_the_child(monkeypatch: pytest.MonkeyPatch):
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert run(monkeypatch, one=Report(), two=lost, three=Report()) == [("one", "done"), ("two", "error")]
