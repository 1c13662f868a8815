"""Whether GPUs can be served: judged device by device, from what torch says of each."""

from __future__ import annotations

import warnings

import pytest
import torch

from halfbyte import backends
from halfbyte.backends import Backend, gpu_support, registry
from halfbyte.backends.reference import four_bit as reference

OLD, NEW = ("GeForce GTX 1080", (6, 1)), ("NVIDIA L4", (8, 9))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """``gpus(OLD, NEW)``: torch reports those."""

    def report(*found: tuple[str, tuple[int, int]]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: found[torch.device(device).index][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[torch.device(device).index][1])
        monkeypatch.setattr(gpu_support.importlib.util, "find_spec", lambda name: name)

    return report


def test_an_old_gpu_alone_is_declined_with_its_name(gpus) -> None:
    gpus(OLD)
    assert gpu_support.why_not() == "GeForce GTX 1080 has compute capability 6.1, Triton needs 7.5"


def test_an_old_gpu_beside_a_new_one_is_declined_alone(gpus) -> None:
    gpus(OLD, NEW)
    assert gpu_support.why_not() is None
    assert gpu_support.why_not_on(torch.device("cuda", 0)) is not None
    assert gpu_support.why_not_on(torch.device("cuda", 1)) is None


def test_no_gpu_is_said(gpus) -> None:
    gpus()
    assert gpu_support.why_not() == "torch sees no GPU"


def test_candidates_differ_between_devices_of_one_type() -> None:
    def why_not_on(device: torch.device) -> str | None:
        return "too old" if device.index == 0 else None

    backends.register(Backend("newer", frozenset({"xpu"}), 99, "halfbyte.backends.reference", why_not_on=why_not_on))
    try:
        backends.implements("newer", "gemm_4bit")(reference.gemm_4bit)
        with pytest.warns(UserWarning, match="on xpu:0 compute in plain torch operations, slowly .newer: too old"):
            names = [c.backend.name for c in registry._find_candidates("gemm_4bit", torch.device("xpu", 0))]
        assert names == ["reference"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            names = [c.backend.name for c in registry._find_candidates("gemm_4bit", torch.device("xpu", 1))]
            registry._find_candidates("gemm_4bit", torch.device("xpu", 0))  # said once
        assert names == ["newer", "reference"]
    finally:
        backends.unregister("newer")
        registry._told.clear()
