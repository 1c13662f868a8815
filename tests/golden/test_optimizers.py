"""State dicts that bitsandbytes 0.50.2 wrote resume here with the same next step; its signatures are ours."""

import copy
import inspect
import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import optim
from halfbyte.errors import CheckpointError
from tests.support.tolerances import TOLERANCES, close, rounding

FOLDER = Path(__file__).parent / "optim"
SHAPES = ((13, 100), (7,))
CLASSES: dict[str, list[list[Any]]] = json.loads((FOLDER / "signatures.json").read_text())


@cache
def written() -> dict[str, Any]:
    return torch.load(FOLDER / "states.pt")


CASES = sorted(written())


def draw(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def resumed(case: dict[str, Any], state_dict: dict[str, Any]) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    params = [torch.nn.Parameter(value.clone()) for value in case["before"]]
    # The settings come from the state dict.
    given = {"momentum": 0.1} if "momentum" in case["settings"] else {}
    bounds = {"max_unorm": case["settings"]["max_unorm"]} if "max_unorm" in case["settings"] else {}
    optimizer = getattr(optim, case["class"])(params, 1e-3, **given, **bounds, min_8bit_size=1000)
    optimizer.load_state_dict(state_dict)
    for p, gradient in zip(params, draw(4, case["dtype"]), strict=True):
        p.grad = gradient
    optimizer.step()
    return params, optimizer


def check_next_step(case: dict[str, Any], state_dict: dict[str, Any]) -> None:
    params, _ = resumed(case, state_dict)
    for p, before, after in zip(params, case["before"], case["after"], strict=True):
        check_close("next step", p, before, after)


def check_close(name: str, p: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
    step = (after.double() - before.double()).abs()
    allowed = TOLERANCES["optimizer step fp32"].relative * (before.double().abs() + step)
    allowed += after.double().abs() * 2 * rounding(p.dtype).relative  # both sides are rounded
    close(name, p, after, TOLERANCES["optimizer step"], allowed)


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_resumes_with_the_same_next_step(name: str) -> None:
    check_next_step(written()[name], written()[name]["state_dict"])


@pytest.mark.parametrize("name", CASES)
def test_a_flat_state_dict_of_before_0_49_does_too(name: str) -> None:
    case = written()[name]
    state = {}
    for index, entries in case["state_dict"]["state"].items():
        inner = entries["__bnb_optimizer_quant_state__"]
        state[index] = {"step": entries["step"], **inner}
    check_next_step(case, {**case["state_dict"], "state": state})


@pytest.mark.parametrize("name", CASES)
def test_what_is_loaded_is_saved_again(name: str) -> None:
    case = written()[name]
    params = [torch.nn.Parameter(value.clone()) for value in case["before"]]
    given = {"momentum": 0.1} if "momentum" in case["settings"] else {}
    optimizer = getattr(optim, case["class"])(params, 1e-3, **given, min_8bit_size=1000)
    optimizer.load_state_dict(case["state_dict"])
    again = optimizer.state_dict()
    for index, entries in case["state_dict"]["state"].items():
        assert again["state"][index]["step"] == entries["step"]
        theirs, ours = (one["__bnb_optimizer_quant_state__"] for one in (entries, again["state"][index]))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), key
            assert ours[key].dtype == value.dtype
    for group, other in zip(again["param_groups"], case["state_dict"]["param_groups"], strict=True):
        assert group == other


@pytest.mark.parametrize("name", CLASSES)
def test_the_signature_is_theirs(name: str) -> None:
    parameters = list(inspect.signature(getattr(optim, name).__init__).parameters.values())[1:]
    ours = [
        [p.name, None if p.default is p.empty else repr(p.default)] for p in parameters if p.kind is not p.VAR_KEYWORD
    ]
    assert ours == CLASSES[name]


def test_states_in_blocks_of_2048_go_on_in_blocks_of_2048() -> None:
    p = torch.nn.Parameter(torch.randn(5000))
    optimizer = optim.Adam8bit([p], lr=1e-2)
    p.grad = torch.randn(5000)
    optimizer.step()
    old = optimizer.state_dict()
    inner = old["state"][0]["__bnb_optimizer_quant_state__"]
    inner["absmax1"], inner["absmax2"] = torch.tensor([0.5, 0.25, 1.0]), torch.tensor([0.1, 0.2, 0.3])
    other = optim.Adam8bit([p], lr=1e-2)
    other.load_state_dict(old)
    other.step()
    assert other.state[p]["absmax1"].shape == (3,)


def test_states_without_blocks_are_refused_with_a_way_on() -> None:
    p = torch.nn.Parameter(torch.randn(5000))
    optimizer = optim.Adam8bit([p], lr=1e-2)
    entries = {"step": 3, "state1": torch.zeros(5000, dtype=torch.uint8), "max1": torch.ones(1)}
    groups = optimizer.state_dict()["param_groups"]
    with pytest.raises(CheckpointError, match="without blocks"):
        optimizer.load_state_dict({"state": {0: entries}, "param_groups": groups})


@pytest.mark.parametrize(
    ("key", "value"), [("state1", torch.zeros(99, dtype=torch.uint8)), ("absmax1", torch.zeros(7))]
)
def test_a_state_that_does_not_fit_is_refused(key: str, value: torch.Tensor) -> None:
    p = torch.nn.Parameter(torch.randn(5000))
    optimizer = optim.Lion8bit([p], lr=1e-2)
    p.grad = torch.randn(5000)
    optimizer.step()
    damaged = optimizer.state_dict()
    damaged["state"][0]["__bnb_optimizer_quant_state__"][key] = value
    with pytest.raises(CheckpointError):
        optimizer.load_state_dict(damaged)


@pytest.mark.peer
def test_bitsandbytes_resumes_what_we_save(tmp_path: Path, peer_python: str) -> None:
    cases: dict[str, Any] = {}
    ours: dict[str, list[torch.Tensor]] = {}
    for name, golden in written().items():
        params = [torch.nn.Parameter(value) for value in draw(0, golden["dtype"])]
        optimizer = getattr(optim, golden["class"])(params, **golden["settings"], min_8bit_size=1000)
        for step in (1, 2, 3, 4):
            gradients = draw(step, golden["dtype"])
            if step == 4:
                before = [p.detach().clone() for p in params]
                saved = {"class": golden["class"], "settings": golden["settings"], "before": before}
                cases[name] = {**saved, "gradients": gradients, "state_dict": copy.deepcopy(optimizer.state_dict())}
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
        ours[name] = [p.detach().clone() for p in params]
    torch.save(cases, tmp_path / "ours.pt")
    script = FOLDER / "read_with_peer.py"
    command = [peer_python, "-W", "ignore", str(script), str(tmp_path / "ours.pt"), str(tmp_path / "theirs.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "theirs.pt")
    for name, case in cases.items():
        for left, right, before in zip(ours[name], theirs[name], case["before"], strict=True):
            check_close(name, left, before, right)
