"""Optimizer steps on a GPU: against the textbook and the CPU, many tensors, paging, graphs, no waiting."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import halfbyte.functional as F
from halfbyte import optim
from halfbyte.backends.triton.optimizer import VALUES
from halfbyte.optim import paging
from halfbyte.rules import hyper, rule_named, rule_names
from tests.reference.optimizers import OPTIMIZERS, Settings, Textbook, excess
from tests.support.tolerances import TOLERANCES, close, rounding

pytestmark = pytest.mark.gpu
ops = torch.ops.halfbyte
NUMEL, BLOCKSIZE = VALUES + 1037, 256
FP32 = TOLERANCES["optimizer step fp32"].relative
FAMILY = ["AdamW8bit", "AdamW32bit", "AdEMAMix8bit", "Lion8bit", "SGD8bit", "RMSprop8bit", "Adagrad8bit", "LAMB8bit"]


@pytest.fixture(autouse=True)
def fresh_manager() -> Iterator[None]:
    optim.GlobalOptimManager.get_instance().initialize()
    yield
    optim.GlobalOptimManager.get_instance().initialize()


def numbers(o: Settings, step: int) -> torch.Tensor:
    beta1, beta2, beta3 = o.betas
    rest = {"alpha": o.alpha, "eps": o.eps, "weight_decay": o.weight_decay, "grad_scale": o.grad_scale}
    return torch.tensor(hyper(lr=o.lr, beta1=beta1, beta2=beta2, beta3=beta3, step=step, **rest))


def gradient(generator: torch.Generator, size: torch.Tensor) -> torch.Tensor:
    """Scales from 1e-3 to 1e3 side by side; some exact zeros."""
    found = torch.randn(NUMEL, generator=generator) * size + 0.3 * size
    found[torch.rand(NUMEL, generator=generator) < 0.05] = 0.0
    return found


def exact(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().double().numpy()


class Run:
    """A parameter on the GPU with its states, stepped beside the textbook."""

    def __init__(self, name: str, bits: int, dtype: torch.dtype, grad: torch.dtype) -> None:
        self.name, self.eight, self.grad = name, bits == 8, grad
        self.signed, self.o = rule_named(name).signed, Settings()
        self.p = torch.randn(NUMEL).mul(0.3).to(dtype).cuda()
        kind = torch.uint8 if self.eight else torch.float32
        self.states = [torch.zeros(NUMEL, dtype=kind, device="cuda") for _ in self.signed]
        self.absmax = [torch.zeros(-(-NUMEL // BLOCKSIZE), device="cuda") for _ in self.signed]
        self.maps = [F.create_dynamic_map(one).cuda() for one in self.signed]
        self.generator = torch.Generator().manual_seed(5)
        self.size = torch.logspace(-3, 3, NUMEL)[torch.randperm(NUMEL, generator=self.generator)]

    def values(self) -> tuple[np.ndarray[Any, Any], ...]:
        if not self.eight:
            return tuple(exact(state) for state in self.states)
        return tuple(
            exact(code)[exact(q).astype(int)] * exact(a).repeat(BLOCKSIZE)[:NUMEL]
            for q, a, code in zip(self.states, self.absmax, self.maps, strict=True)
        )

    def step(self, t: int, checked: bool) -> None:
        g = gradient(self.generator, self.size).to(self.grad)
        before, book = self.p.cpu(), None
        if checked:
            book = Textbook(self.name, exact(self.p), self.o, self.values(), t - 1)
        h = numbers(self.o, t)
        if self.eight:
            lists = ([self.p], [g.cuda()], self.states, self.absmax, self.maps)
            ops.optimizer_step_8bit(*lists, h, BLOCKSIZE, self.name)
        else:
            ops.optimizer_step_32bit([self.p], [g.cuda()], self.states, h, self.name)
        if book is not None:
            self.check(before, g, book)

    def check(self, before: torch.Tensor, g: torch.Tensor, book: Textbook) -> None:
        o, old = self.o, book.states
        coupled = (
            o.weight_decay * np.abs(exact(before)) / o.grad_scale if rule_named(self.name).decay == "coupled" else 0
        )
        size = Textbook(self.name, np.zeros(NUMEL), o, tuple(np.abs(s) for s in old), book.steps)
        size.step(np.abs(exact(g)) + coupled)
        book.step(exact(g))
        moved = np.abs(size.p)
        if self.name in {"rmsprop", "adagrad"}:
            moved = 2 * o.lr * o.grad_scale * (np.abs(exact(g)) + coupled) / (np.sqrt(book.states[0]) + o.eps)
        after, expected = self.p.cpu(), torch.from_numpy(book.p)
        slack = expected.abs() * rounding(after.dtype).relative
        slack = slack + FP32 * (before.double().abs() + torch.from_numpy(moved)) + torch.finfo(after.dtype).tiny
        sure = torch.ones(NUMEL, dtype=torch.bool)
        if self.name == "lion":
            mix = o.betas[0] * old[0] + (1 - o.betas[0]) * exact(g) * o.grad_scale
            sure = torch.from_numpy(np.abs(mix) > FP32 * np.abs(old[0]))
        close(f"{self.name} {book.steps}", after[sure], expected[sure], TOLERANCES["optimizer step"], slack[sure])
        for number, (state, bound) in enumerate(zip(book.states, size.states, strict=True)):
            if self.eight:
                self.check_codes(number, state, bound)
            else:
                fp32 = TOLERANCES["optimizer step fp32"]
                close("state", self.states[number].cpu(), torch.from_numpy(state), fp32, torch.from_numpy(bound))

    def check_codes(self, number: int, state: np.ndarray[Any, Any], bound: np.ndarray[Any, Any]) -> None:
        """Codes are those of the exact state under the stored scales, and those are the blocks'."""
        blocks = np.pad(np.abs(state), (0, -NUMEL % BLOCKSIZE)).reshape(-1, BLOCKSIZE).max(axis=1)
        slack = np.pad(bound, (0, -NUMEL % BLOCKSIZE)).reshape(-1, BLOCKSIZE).max(axis=1)
        fp32 = TOLERANCES["optimizer step fp32"]
        close("absmax", self.absmax[number].cpu(), torch.from_numpy(blocks), fp32, torch.from_numpy(slack))
        scale = exact(self.absmax[number]).repeat(BLOCKSIZE)[:NUMEL]
        safe = np.where(scale > 0, scale, 1)
        codes, levels = exact(self.states[number]).astype(int), exact(self.maps[number])
        allowed = TOLERANCES["nearest slack"].relative + 2 * FP32 * bound / safe
        assert (excess(codes, state, scale, levels) <= allowed).all()


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_200_steps_of_the_textbook(name: str, bits: int) -> None:
    run = Run(name, bits, torch.float32, torch.float32)
    for t in range(1, 201):
        run.step(t, checked=t <= 20 or t % 10 == 0)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["adam", "ademamix", "momentum"])
@pytest.mark.parametrize(
    ("dtype", "grad"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)],
)
def test_every_dtype(name: str, dtype: torch.dtype, grad: torch.dtype, bits: int) -> None:
    run = Run(name, bits, dtype, grad)
    for t in range(1, 6):
        run.step(t, checked=True)


@pytest.mark.parametrize("numel", [BLOCKSIZE, VALUES, VALUES + 77, 3 * VALUES])
@pytest.mark.parametrize("name", ["adam", "ademamix", "adopt"])
def test_a_square_above_zero_never_becomes_zero(name: str, numel: int) -> None:
    g = torch.logspace(0, -10, numel, device="cuda")
    g[::7] = 0.0
    signed = rule_named(name).signed
    maps = [F.create_dynamic_map(one).cuda() for one in signed]
    codes = [torch.full((numel,), int((code == 0).nonzero()), dtype=torch.uint8, device="cuda") for code in maps]
    absmax = [torch.zeros(-(-numel // BLOCKSIZE), device="cuda") for _ in signed]
    for t in range(1, 4):
        p, h = torch.zeros_like(g), numbers(Settings(), t)
        ops.optimizer_step_8bit([p], [g], codes, absmax, maps, h, BLOCKSIZE, name)
    assert torch.equal(codes[-1] == 0, g == 0)


def lists(rule: str, device: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> dict[str, list[torch.Tensor]]:
    signed = rule_named(rule).signed
    return {
        "params": [torch.linspace(-2, 2, n).to(dtype).to(device) for n in sizes],
        "states": [torch.zeros(n, dtype=torch.uint8, device=device) for n in sizes for _ in signed],
        "absmax": [torch.zeros(-(-n // 256), device=device) for n in sizes for _ in signed],
    }


def steps(rule: str, device: str, dtype: torch.dtype, sizes: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    made, generator = lists(rule, device, dtype, sizes), torch.Generator().manual_seed(3)
    maps = [F.create_dynamic_map(one).to(device) for one in rule_named(rule).signed]
    for t in range(1, 6):
        grads = [torch.randn(n, generator=generator) * torch.logspace(-2, 2, n) for n in sizes]
        for g in grads:
            g[::17] = 0.0
        if t == 3:
            grads[0][40], grads[0][900] = float("nan"), float("inf")
        grads = [g.to(dtype).to(device) for g in grads]
        h = torch.tensor(hyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=t))
        ops.optimizer_step_8bit(
            made["params"], grads, made["states"], made["absmax"], maps, h, 256, rule, False, seed + t if seed else -1
        )
    return [tensor.cpu() for found in made.values() for tensor in found]


@pytest.mark.parametrize("rule", ["lion", "momentum"])
def test_codes_of_many_sizes_are_the_cpus_to_the_bit(rule: str) -> None:
    # These rules divide nothing, so that every operation is rounded alike.
    sizes = (70_001, 1, 256, 4096, 255, 2048, 3 * 2048)
    for ours, theirs in zip(
        steps(rule, "cuda", torch.float32, sizes, 0), steps(rule, "cpu", torch.float32, sizes, 0), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_addresses_that_are_not_aligned_change_nothing() -> None:
    whole = lists("lion", "cuda", torch.float32, (4097,))
    g, h = torch.randn(4097, device="cuda"), torch.tensor(hyper(lr=0.1, beta1=0.9, beta2=0.99, eps=0.0, step=1))
    maps = [F.create_dynamic_map().cuda()]
    odd = {key: [torch.cat([t[:1], t])[1:] for t in found] for key, found in whole.items()}
    for made, grad in ((whole, g), (odd, torch.cat([g[:1], g])[1:])):
        ops.optimizer_step_8bit(made["params"], [grad], made["states"], made["absmax"], maps, h, 256, "lion")
    assert odd["params"][0].data_ptr() % 16
    for key, (tensor,) in whole.items():
        assert torch.equal(tensor, odd[key][0])


def test_random_rounding_draws_what_the_cpu_draws() -> None:
    ours, theirs = (steps("lion", device, torch.bfloat16, (70_001, 2048), 77) for device in ("cuda", "cpu"))
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)


def test_random_rounding_keeps_updates_that_rounding_to_nearest_loses() -> None:
    means: list[float] = []
    for random in (True, False):
        p = torch.nn.Parameter(torch.ones(1 << 18, dtype=torch.bfloat16, device="cuda"))
        optimizer = optim.Lion8bit([p], lr=1e-4, stochastic_rounding=random)
        for _ in range(20):
            p.grad = torch.ones_like(p)
            optimizer.step()
        means.append(float(p.detach().double().mean()))
    assert means[0] == pytest.approx(1 - 20e-4, abs=5e-5)
    assert means[1] == 1.0


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


def many(count: int, numel: int = 5000) -> list[torch.nn.Parameter]:
    found = [torch.nn.Parameter(torch.randn(numel, device="cuda")) for _ in range(count)]
    for p in found:
        p.grad = torch.randn_like(p)
    return found


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


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "AdamW32bit"])
def test_paged_states_step_as_others_do(name: str, backend: str, only_backend: Callable[[str], None]) -> None:
    if backend:
        only_backend(backend)
    sizes, generator = (700_001, 300_000, 5000, 1 << 19), torch.Generator().manual_seed(1)
    start = [torch.randn(n, generator=generator) for n in sizes]
    grads = [[torch.randn(n, generator=generator) for n in sizes] for _ in range(4)]
    found: list[Any] = []
    for kind in (name, f"Paged{name}"):
        params = [torch.nn.Parameter(one.cuda()) for one in start]
        optimizer = getattr(optim, kind)(params, lr=1e-2)
        for each in grads:
            for p, g in zip(params, each, strict=True):
                p.grad = g.cuda()
            optimizer.step()
        found.append((params, optimizer))
    (plain, other), (paged, pager) = found
    for p, q in zip(plain, paged, strict=True):
        assert torch.equal(p, q)
        large = q.numel() >= paging.SMALLEST
        assert pager.state[q]["state1"].is_pinned() == large
    whole, half = pager.state_dict(), other.state_dict()
    wrapper = "__bnb_optimizer_quant_state__"
    for index, entry in half["state"].items():
        for key, value in entry[wrapper].items():
            assert torch.equal(whole["state"][index][wrapper][key].cpu(), value.cpu())


def test_a_paged_optimizer_takes_the_devices_memory_for_scales_only() -> None:
    taken: dict[str, int] = {}
    for name in ("AdamW8bit", "PagedAdamW8bit"):
        params = many(1, 1 << 25)
        before = torch.cuda.memory_allocated()
        optimizer = getattr(optim, name)(params, lr=1e-3)
        optimizer.step()
        optimizer.step()
        taken[name] = torch.cuda.memory_allocated() - before
    assert taken["AdamW8bit"] >= 2 << 25
    assert taken["PagedAdamW8bit"] <= (2 << 25) // 64 + (1 << 20)


def paged_behind_a_long_wait() -> tuple[optim.Optimizer8bit, weakref.ref[torch.Tensor]]:
    """An optimizer whose last step the GPU has not begun, and one of its states."""
    optimizer = optim.PagedAdamW8bit(many(1, 200_000), lr=1e-2)
    optimizer.step()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # about two seconds: collecting garbage on a busy machine took half of one
    optimizer.step()
    (state,) = optimizer.state.values()
    return optimizer, weakref.ref(state["state1"])


def test_host_memory_that_a_step_still_uses_is_not_freed() -> None:
    optimizer, state1 = paged_behind_a_long_wait()
    optimizer.state.clear()
    optimizer._plan = None
    gc.collect()
    assert not torch.cuda.current_stream().query()
    assert state1() is not None
    optimizer.finish_paging()
    gc.collect()
    assert state1() is None


def test_a_paged_optimizer_goes_when_its_last_step_is_done() -> None:
    optimizer, state1 = paged_behind_a_long_wait()
    assert not torch.cuda.current_stream().query()
    del optimizer
    gc.collect()
    assert torch.cuda.current_stream().query()
    assert state1() is None


def test_a_loaded_paged_state_is_in_host_memory_and_goes_on() -> None:
    (p,) = many(1, 200_000)
    q = torch.nn.Parameter(p.detach().clone())
    first, second = optim.PagedAdamW8bit([p], lr=1e-2), optim.PagedAdamW8bit([q], lr=1e-2)
    first.step()
    q.data.copy_(p)
    second.load_state_dict(first.state_dict())
    q.grad = p.grad = torch.randn_like(p)
    first.step()
    second.step()
    assert second.state[q]["state1"].is_pinned()
    assert torch.equal(p, q)


def test_memory_that_cannot_be_pinned_is_said_and_the_step_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros: Callable[..., torch.Tensor] = torch.zeros

    def none_left(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory")
        return zeros(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", none_left)
    (p,) = many(1, 200_000)
    optimizer = optim.PagedAdamW8bit([p], lr=1e-2)
    with pytest.warns(UserWarning, match="could not be pinned .*stays on the device"):
        optimizer.step()
    assert optimizer.state[p]["state1"].is_cuda


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


def test_every_rule_has_a_textbook() -> None:
    assert set(rule_names()) == set(OPTIMIZERS)
