"""What goes beyond bitsandbytes' present signatures: clipping by percentile, random rounding, device steps, release."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from halfbyte import optim

N = 5000


def parameter(dtype: torch.dtype = torch.float32, value: float | None = None) -> torch.nn.Parameter:
    return torch.nn.Parameter((torch.randn(N) if value is None else torch.full((N,), value)).to(dtype))


def test_clipping_by_percentile_holds_an_outlier_to_the_norms_before() -> None:
    p, q = parameter(), parameter()
    clipped = optim.SGD([p], 1e-2, momentum=0.5, percentile_clipping=5)
    plain = optim.SGD([q], 1e-2, momentum=0.5)
    q.data.copy_(p.data)
    history: list[float] = []
    for step in range(1, 8):
        g = torch.randn(N) * (100 if step == 6 else 1)
        norm = float(g.norm())
        # The first step fills all 100 places, the n-th takes the n-th.
        history = [norm**2] * 100 if step == 1 else [norm**2 if i == step % 100 else h for i, h in enumerate(history)]
        bound = sorted(history)[5] ** 0.5
        p.grad, q.grad = g.clone(), g * min(1.0, bound / norm)
        clipped.step()
        plain.step()
    assert (p - q).abs().max() < 1e-6
    assert clipped.state[p]["gnorm_vec"].shape == (100,)
    again = optim.SGD([p], 1e-2, momentum=0.5, percentile_clipping=5)
    again.load_state_dict(clipped.state_dict())
    assert torch.equal(again.state[p]["gnorm_vec"], clipped.state[p]["gnorm_vec"])


def test_random_rounding_keeps_steps_that_bf16_would_lose() -> None:
    # One step is an eighth of the distance between bf16 values at 1.
    lost, kept = parameter(torch.bfloat16, 1.0), parameter(torch.bfloat16, 1.0)
    nearest = optim.Lion8bit([lost], lr=2**-10)
    random = optim.Lion8bit([kept], lr=2**-10, stochastic_rounding=True)
    for _ in range(64):
        lost.grad, kept.grad = torch.ones_like(lost), torch.ones_like(kept)
        nearest.step()
        random.step()
    assert (lost == 1).all()
    assert kept.float().mean().item() == pytest.approx(1 - 64 * 2**-10, abs=1e-3)


def test_random_rounding_repeats_itself_and_takes_neighbours_only() -> None:
    first, second, exact = (parameter(torch.bfloat16), parameter(torch.bfloat16), parameter())
    second.data.copy_(first.data)
    exact.data.copy_(first.data)
    made = [
        optim.AdamW32bit([p], lr=1e-3, **({} if p is exact else {"stochastic_rounding": True}))
        for p in (first, second, exact)
    ]
    g = torch.randn(N).bfloat16()
    for p, optimizer in zip((first, second, exact), made, strict=True):
        p.grad = g.to(p.dtype)
        optimizer.step()
    assert torch.equal(first, second)
    spacing = torch.finfo(torch.bfloat16).eps * exact.detach().abs()
    assert ((first.float() - exact).abs() <= spacing).all()
    assert not torch.equal(first, exact.bfloat16())


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "ADOPT8bit", "Lion8bit", "LAMB8bit"])
def test_steps_counted_on_the_device_give_the_same_values(name: str) -> None:
    p, q = parameter(), parameter()
    q.data.copy_(p.data)
    more = {"t_alpha": 4, "t_beta3": 4} if name.startswith("AdEMAMix") else {}
    host = getattr(optim, name)([p], lr=1e-3, **more)
    device = getattr(optim, name)([q], lr=torch.tensor(1e-3), capturable=True, **more)
    for _ in range(6):
        p.grad = torch.randn(N)
        q.grad = p.grad.clone()
        host.step()
        device.step()
    assert isinstance(device.state[q]["step"], torch.Tensor)
    assert float(device.state[q]["step"]) == host.state[p]["step"] == 6
    # A difference in the last bit of a setting may turn a code over: 2 % of a step of 1e-3.
    assert (p - q).abs().max() < 1e-4
    assert (p - q).abs().mean() < 1e-7
    host.load_state_dict(device.state_dict())
    assert host.state[p]["step"] == 6


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion32bit", "LARS8bit"])
def test_steps_in_the_backward_pass_free_every_gradient(name: str) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(70, 80), torch.nn.Tanh(), torch.nn.Linear(80, 60))
    other = copy.deepcopy(net)
    settings = {"momentum": 0.9} if name == "LARS8bit" else {}
    optimizer = getattr(optim, name)(net.parameters(), lr=1e-2, **settings)
    usual = getattr(optim, name)(other.parameters(), lr=1e-2, **settings)
    stop = optim.step_in_backward(optimizer)
    for _ in range(3):
        x = torch.randn(5, 70)
        net(x).square().mean().backward()
        assert all(p.grad is None for p in net.parameters())
        usual.zero_grad()
        other(x).square().mean().backward()
        usual.step()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    stop()
    net(torch.randn(5, 70)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_parameter_without_a_gradient_takes_no_step_on_the_device_either() -> None:
    often, once = parameter(), parameter()
    optimizer = optim.AdamW8bit([often, once], capturable=True)
    for number in range(3):
        often.grad, once.grad = torch.randn(N), None if number else torch.randn(N)
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in (often, once)] == [3, 1]


@pytest.mark.parametrize("together", [0, 1])
def test_steps_in_the_backward_pass_are_counted_on_the_device_one_by_one(together: int) -> None:
    params = [parameter(), parameter()]
    optimizer = optim.AdamW8bit(params, capturable=True)
    for _ in range(together):
        for p in params:
            p.grad = torch.randn(N)
        optimizer.step()
        optimizer.zero_grad()
    optim.step_in_backward(optimizer)
    for _ in range(2):
        sum(p.square().sum() for p in params).backward()
    assert [float(optimizer.state[p]["step"]) for p in params] == [together + 2] * 2


def test_a_compiled_training_step_gives_the_same_values() -> None:
    p, q = parameter(), parameter()
    q.data.copy_(p.data)
    eager, compiled = optim.AdamW8bit([p], lr=1e-2), optim.AdamW8bit([q], lr=1e-2)
    step = torch.compile(compiled.step, backend="eager")
    for _ in range(4):
        p.grad = torch.randn(N)
        q.grad = p.grad.clone()
        eager.step()
        step()
    assert torch.equal(p, q)


def test_a_subclass_may_step_parameters_by_itself() -> None:
    class Halving(optim.Optimizer1State):
        def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
            p.mul_(0.5 if group["lr"] and gindex == pindex == 0 else 0.0)

    p = parameter(value=1.0)
    optimizer = Halving("lion", [p])
    p.grad = torch.ones(N)
    optimizer.step()
    assert (p == 0.5).all()


def test_a_learning_rate_may_be_a_tensor() -> None:
    p, q = parameter(), parameter()
    q.data.copy_(p.data)
    left, right = optim.AdamW8bit([p], lr=1e-2), optim.AdamW8bit([q], lr=torch.tensor(1e-2))
    p.grad = torch.randn(N)
    q.grad = p.grad.clone()
    left.step()
    right.step()
    assert (p - q).abs().max() < 1e-8
