"""Steps that repeat the last one: they follow what changes in between, and keep nothing alive."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from halfbyte import optim
from halfbyte.optim.base import Optimizer8bit

Change = Callable[[Optimizer8bit, list[torch.nn.Parameter]], None]


@pytest.fixture(autouse=True)
def fresh_manager() -> Iterator[None]:
    yield
    optim.GlobalOptimManager.get_instance().initialize()


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]


def steps(planned: bool, change: Change) -> list[torch.Tensor]:
    """Six steps, ``change`` before the fourth; without plans every step is found out anew."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (5000, 300, 6000, 7)]
    optimizer = optim.AdamW8bit(groups(params), lr=1e-2)
    for number in range(6):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        if number == 3:
            change(optimizer, params)
        optimizer.step()
        if not planned:
            optimizer._plan = None
    return [p.detach() for p in params]


def nothing(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    """Leave all as it is."""


def rate(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optimizer.param_groups[1]["lr"] = 1e-3


def decay(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.5


def no_gradient(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    params[1].grad = None


def other_memory(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    params[0].data = params[0].detach() * 2


def other_state(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.state[params[0]]["state1"] = torch.full_like(optimizer.state[params[0]]["state1"], 130)


def other_step(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optimizer.state[params[2]]["step"] = 40


def override(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optim.GlobalOptimManager.get_instance().override_config(params[0], "lr", 1e-4)


def setting(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optimizer.args.skip_zeros = True
    params[0].grad[::2] = 0.0


def gradient_of_another_kind(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    params[0].grad = torch.randn(5000).expand(5000).flip(0).view(50, 100).t().contiguous().t().reshape(-1)


@pytest.mark.parametrize(
    "change",
    [
        *(nothing, rate, decay, no_gradient, other_memory, other_state, other_step, override, setting),
        gradient_of_another_kind,
    ],
)
def test_a_planned_step_is_a_step(change: Change) -> None:
    torch.manual_seed(2)
    plain = steps(False, change)
    optim.GlobalOptimManager.get_instance().initialize()
    torch.manual_seed(2)
    for ours, theirs in zip(steps(True, change), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_the_second_step_is_planned() -> None:
    p = torch.nn.Parameter(torch.ones(10))
    optimizer = optim.Lion8bit([p], lr=0.1)
    for _ in range(3):
        p.grad = torch.ones(10)
        optimizer.step()
    assert optimizer._plan is not None
    assert optimizer.state[p]["step"] == 3
    assert p[0].item() == pytest.approx(0.7)


def test_a_plan_keeps_no_gradient_alive() -> None:
    p = torch.nn.Parameter(torch.ones(10))
    optimizer = optim.AdamW8bit([p], lr=0.1)
    for _ in range(3):
        p.grad = torch.ones(10)
        optimizer.step()
    gone = weakref.ref(p.grad)
    p.grad = None
    assert gone() is None


def test_a_copy_plans_for_itself() -> None:
    p = torch.nn.Parameter(torch.ones(10))
    optimizer = optim.Lion8bit([p], lr=0.1)
    for _ in range(2):
        p.grad = torch.ones(10)
        optimizer.step()
    q, other = copy.deepcopy((p, optimizer))
    q.grad = torch.ones(10)
    other.step()
    assert (p[0].item(), q[0].item()) == (pytest.approx(0.8), pytest.approx(0.7))
