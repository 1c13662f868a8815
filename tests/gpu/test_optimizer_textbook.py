"""Optimizer steps on a GPU against the textbook, for every rule, width and dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import halfbyte.functional as F
from halfbyte.backends.triton.optimizer import VALUES
from halfbyte.rules import hyper, rule_named, rule_names
from tests.reference.optimizers import OPTIMIZERS, Settings, Textbook, excess
from tests.support.tolerances import TOLERANCES, close, rounding

pytestmark = pytest.mark.gpu
ops = torch.ops.halfbyte
NUMEL, BLOCKSIZE = VALUES + 1037, 256
FP32 = TOLERANCES["optimizer step fp32"].relative


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


def test_every_rule_has_a_textbook() -> None:
    assert set(rule_names()) == set(OPTIMIZERS)
