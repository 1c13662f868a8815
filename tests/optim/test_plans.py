"""Steps that repeat the last one: they follow what changes in between, and keep nothing alive."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte import optim
from halfbyte.backends import registry
from halfbyte.backends.reference import optimizer as reference
from halfbyte.backends.registry import Backend, implements
from halfbyte.optim.base import Optimizer8bit
from tests.support.listening import Listener

Change = Callable[[Optimizer8bit, list[torch.nn.Parameter]], None]


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": params[:2]}, {"params": params[2:3], "weight_decay": 0.1}, {"params": params[3:]}]


def steps(planned: bool, change: Change, in_place: bool = False) -> list[torch.Tensor]:
    """Six steps, ``change`` before the fourth; without plans every step is found out anew.

    ``in_place``: gradients stay where they are, so that no new address asks for a call to be prepared again.
    """
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (5000, 300, 6000, 7)]
    optimizer = optim.AdamW8bit(groups(params), lr=1e-2)
    for number in range(6):
        for p in params:
            gradient = torch.randn(p.shape, generator=generator)
            if in_place and p.grad is not None:
                p.grad.copy_(gradient)
            else:
                p.grad = torch.cat([gradient, gradient])[: p.numel()]
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


def rate_of_another_group(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optimizer.param_groups[2]["lr"] = 1e-3


def decay(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.5


def no_gradient(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    params[1].grad = None


def other_memory(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    params[0].data = params[0].detach() * 2


def other_groups(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 1e-3}


def moved_between_groups(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop(0))


def loaded(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def other_codes(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optimizer.state[params[0]]["state1"] = torch.full_like(optimizer.state[params[0]]["state1"], 130)


def other_scales(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optimizer.state[params[0]]["absmax2"] = optimizer.state[params[0]]["absmax2"] * 4


def other_codes_in_the_same_tensor(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    state = optimizer.state[params[0]]["state1"]
    state.data = torch.full_like(state, 130)


def other_dictionary(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optimizer.state[params[0]] = copy.deepcopy(optimizer.state[params[0]])
    optimizer.state[params[0]]["state1"].fill_(130)


def other_step(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optimizer.state[params[2]]["step"] = 40


def override(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optim.GlobalOptimManager.get_instance().override_config(params[0], "lr", 1e-4)


def setting(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    optimizer.args.skip_zeros = True
    params[0].grad[::2] = 0.0


def gradient_with_gaps(optimizer: Optimizer8bit, params: list[torch.nn.Parameter]) -> None:
    values = params[0].grad.clone()
    params[0].grad = params[0].grad.as_strided((5000,), (2,)).copy_(values)  # begins at the same address


CHANGES = [
    *(
        nothing,
        rate,
        rate_of_another_group,
        decay,
        no_gradient,
        gradient_with_gaps,
        other_memory,
        other_step,
        override,
        setting,
    ),
    *(other_groups, moved_between_groups, loaded, other_codes, other_scales, other_codes_in_the_same_tensor),
    other_dictionary,
]


@pytest.fixture
def repeats() -> Iterator[list[int]]:
    """A backend that repeats calls on the memory that they were prepared with; lists the numbers of tensors."""
    seen: list[int] = []
    registry.register(Backend("repeating", frozenset({"cpu"}), 99, "halfbyte.backends.reference"))

    def prepared(lists: list[list[Tensor]], call: Callable[..., None]) -> Callable[[Tensor, int], None]:
        memory = [[tensor.detach() for tensor in tensors] for tensors in lists]

        def run(hyper: Tensor, seed: int) -> None:
            seen.append(len(memory[0]))
            call(memory, hyper, seed)

        return run

    def prepare_8bit(p: Any, g: Any, states: Any, absmax: Any, *rest: Any) -> Callable[[Tensor, int], None]:
        maps, blocksize, *words = rest
        return prepared(
            [p, g, states, absmax],
            lambda m, hyper, seed: reference.optimizer_step_8bit(*m, maps, hyper, blocksize, *words, seed),
        )

    def prepare_32bit(p: Any, g: Any, states: Any, *words: Any) -> Callable[[Tensor, int], None]:
        return prepared([p, g, states], lambda m, hyper, seed: reference.optimizer_step_32bit(*m, hyper, *words, seed))

    implements("repeating", "optimizer_step_8bit", prepare=prepare_8bit)(reference.optimizer_step_8bit)
    implements("repeating", "optimizer_step_32bit", prepare=prepare_32bit)(reference.optimizer_step_32bit)
    yield seen
    registry.unregister("repeating")


@pytest.mark.parametrize("change", CHANGES)
def test_a_planned_step_is_a_step(change: Change) -> None:
    torch.manual_seed(2)
    plain = steps(False, change)
    optim.GlobalOptimManager.get_instance().initialize()
    torch.manual_seed(2)
    for ours, theirs in zip(steps(True, change), plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("change", CHANGES)
def test_a_repeated_call_is_a_step(change: Change, repeats: list[int]) -> None:
    torch.manual_seed(2)
    plain = steps(False, change, in_place=True)
    assert not repeats
    optim.GlobalOptimManager.get_instance().initialize()
    torch.manual_seed(2)
    for ours, theirs in zip(steps(True, change, in_place=True), plain, strict=True):
        assert torch.equal(ours, theirs)
    assert repeats


def test_what_listens_to_ops_hears_a_planned_step_and_later_steps_use_its_gradients(repeats: list[int]) -> None:
    p, first, later = torch.nn.Parameter(torch.zeros(10)), torch.ones(10), torch.full((10,), -1.0)
    optimizer = optim.Lion8bit([p], lr=1.0, betas=(0.0, 0.0))
    for gradient, listened in ((first, False), (first, False), (first, True), (later, True), (later, False)):
        p.grad = gradient
        with Listener() if listened else contextlib.nullcontext():
            optimizer.step()
    assert repeats == [1, 1]
    assert p[0].item() == -1.0


def test_a_plan_is_not_taken_for_another_parameter_of_the_same_size() -> None:
    p, q = torch.nn.Parameter(torch.zeros(10)), torch.nn.Parameter(torch.zeros(10))
    optimizer = optim.Lion8bit([p, q], lr=1.0)
    for one in (p, p, q):
        optimizer.zero_grad()
        one.grad = torch.ones(10)
        optimizer.step()
    assert (p[0].item(), q[0].item()) == (-2.0, -1.0)


def test_steps_that_are_alike_repeat_one_plan() -> None:
    p = torch.nn.Parameter(torch.ones(10))
    optimizer = optim.Lion8bit([p], lr=0.1)
    plans: list[object] = []
    for _ in range(3):
        p.grad = torch.ones(10)
        optimizer.step()
        plans.append(optimizer._plan)
    assert plans[0] is not None
    assert plans[1] is plans[2] is plans[0]
    assert optimizer.state[p]["step"] == 3
    assert p[0].item() == pytest.approx(0.7)


def test_a_plan_keeps_no_memory_that_was_moved_elsewhere() -> None:
    p = torch.nn.Parameter(torch.ones(5000))
    optimizer = optim.AdEMAMix8bit([p], lr=0.1)
    for _ in range(2):
        p.grad = torch.ones(5000)
        optimizer.step()
    state = optimizer.state[p]
    gone = [weakref.ref(one.untyped_storage()) for one in (p.data, *(state[key] for key in ("state1", "absmax1")))]
    state.update({key: value.clone() for key, value in state.items() if isinstance(value, Tensor)})
    p.data = p.data.clone()
    assert [one() for one in gone] == [None, None, None]


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
