"""Optimizers on a GPU: training, one launch for many tensors, plans, graphs, no waiting."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from halfbyte import optim
from tests.support.optimizers import many

pytestmark = pytest.mark.gpu
FAMILY = ["AdamW8bit", "AdamW32bit", "AdEMAMix8bit", "Lion8bit", "SGD8bit", "RMSprop8bit", "Adagrad8bit", "LAMB8bit"]


def train(name: str, device: str, steps: int = 20, **more: Any) -> tuple[list[float], optim.Optimizer8bit]:
    settings = {"momentum": 0.9} if name.startswith("SGD") else {}
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(70, 90), torch.nn.Tanh(), torch.nn.Linear(90, 60)).to(device)
    optimizer = getattr(optim, name)(net.parameters(), lr=1e-2, **settings, **more)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    x, y = torch.randn(64, 70), torch.randn(64, 60)
    found: list[float] = []
    for _ in range(steps):
        loss = (net(x.to(device)) - y.to(device)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        found.append(loss.item())
    return found, optimizer


@pytest.mark.parametrize("name", FAMILY)
def test_training_on_the_gpu_is_training_on_the_cpu(name: str) -> None:
    assert train(name, "cuda")[0][-1] == pytest.approx(train(name, "cpu")[0][-1], rel=0.02)


def test_a_hundred_parameters_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = optim.AdamW8bit(many(100, 4096), lr=1e-3)
    optimizer.step()
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.name.startswith("_optimizer")]
    assert len(kernels) == 1


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "Lion32bit", "PagedAdamW8bit"])
def test_a_step_does_not_wait_for_the_gpu(name: str) -> None:
    optimizer = getattr(optim, name)(many(3, 200_000), lr=1e-3)
    optimizer.step()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_planned_steps_follow_new_gradients_rates_and_parameters() -> None:
    fresh = [torch.randn(5000) for _ in range(6)]
    found: list[list[torch.Tensor]] = []
    for device in ("cuda", "cpu"):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 5000).to(device)) for _ in range(3)]
        optimizer = optim.Lion8bit([{"params": params[:2]}, {"params": params[2:]}], lr=1e-2)
        kept = []
        for t in range(8):
            for i, p in enumerate(params):
                p.grad = fresh[(t + i) % 6].to(device)
                kept.append(p.grad)  # so that every gradient has an address of its own
            if t == 3:
                optimizer.param_groups[1]["lr"] = 1e-3
            if t == 5:
                params[0].grad = None
            if t == 6:
                params[1].data = params[1].detach() * 2
            optimizer.step()
        found.append([p.detach().cpu() for p in params])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_a_plan_keeps_no_gradient_alive() -> None:
    params = many(2, 1 << 20)
    optimizer = optim.AdamW8bit(params, lr=1e-3)
    for _ in range(3):
        optimizer.step()
    optimizer.step()
    before = torch.cuda.memory_allocated()
    optimizer.zero_grad()
    assert before - torch.cuda.memory_allocated() == 2 * 4 << 20


def test_gradient_release_steps_in_backward_and_frees_gradients() -> None:
    losses: list[list[float]] = []
    for released in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4))).cuda()
        optimizer = optim.AdamW8bit(net.parameters(), lr=1e-3)
        if released:
            optim.step_in_backward(optimizer)
        found: list[float] = []
        for t in range(5):
            torch.manual_seed(t)
            loss = (net(torch.randn(8, 256, device="cuda")) - 1).square().mean()
            loss.backward()
            if released:
                assert all(p.grad is None for p in net.parameters())
            else:
                optimizer.step()
                optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == losses[1]


def test_a_step_of_many_parameters_can_be_captured_in_a_graph() -> None:
    mine = many(40)
    others = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    for p, q in zip(mine, others, strict=True):
        q.grad = p.grad.clone()
    captured, plain = optim.AdamW8bit(mine, lr=1e-2, capturable=True), optim.AdamW8bit(others, lr=1e-2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()
    stream.synchronize()
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
        plain.step()
    assert float(captured.state[mine[-1]]["step"]) == 4
    assert len({id(captured.state[p]["step"]) for p in mine}) == 1
    for p, q in zip(mine, others, strict=True):
        assert (p - q).abs().max() < 1e-4


def test_gradients_that_move_leave_no_tables_behind() -> None:
    parameters = many(300)
    optimizer = optim.AdamW8bit(parameters, lr=1e-3)
    values = [p.grad for p in parameters]
    taken: list[int] = []
    before: list[list[torch.Tensor]] = []
    for _ in range(40):
        before.append(values)  # so that the next ones lie elsewhere
        values = [value.clone() for value in values]
        for p, value in zip(parameters, values, strict=True):
            p.grad = value
        optimizer.step()
        held = {value.data_ptr(): value.untyped_storage().nbytes() for held in [*before, values] for value in held}
        taken.append(torch.cuda.memory_allocated() - sum(-(-size // 512) * 512 for size in held.values()))
    assert taken[-1] - taken[1] <= 1 << 20


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train("PagedAdamW8bit", "cuda", 3)
        train("AdamW8bit", "cuda", 3)
