"""Every algorithm on every CPU backend against the textbook in float64: 200 steps, tails, every dtype, worst values."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import halfbyte.functional as F
from halfbyte.rules import hyper, rule_named, rule_names
from tests.reference.optimizers import OPTIMIZERS, Settings, Textbook, excess
from tests.support.tolerances import TOLERANCES, close, rounding

ops = torch.ops.halfbyte
NUMEL, BLOCKSIZE = 1037, 256
MAPS = {True: F.create_dynamic_map(), False: F.create_dynamic_map(signed=False)}
FP32 = TOLERANCES["optimizer step fp32"].relative

pytestmark = pytest.mark.parametrize("backend", ["reference", "cpu"])


@pytest.fixture(autouse=True)
def chosen(backend: str, only_backend: Callable[[str], None]) -> None:
    only_backend(backend)


def numbers(o: Settings, step: int) -> torch.Tensor:
    beta1, beta2, beta3 = o.betas
    return torch.tensor(
        hyper(
            lr=o.lr,
            beta1=beta1,
            beta2=beta2,
            beta3=beta3,
            alpha=o.alpha,
            eps=o.eps,
            weight_decay=o.weight_decay,
            grad_scale=o.grad_scale,
            step=step,
        )
    )


def start(dtype: torch.dtype, numel: int = NUMEL) -> torch.Tensor:
    return torch.randn(numel).mul(0.3).to(dtype)


def gradients(steps: int, dtype: torch.dtype, numel: int = NUMEL) -> list[torch.Tensor]:
    """Scales from 1e-3 to 1e3 side by side; some exact zeros."""
    size = torch.logspace(-3, 3, numel)[torch.randperm(numel)]
    found = [torch.randn(numel) * size + 0.3 * size for _ in range(steps)]
    for one in found:
        one[torch.rand(numel) < 0.05] = 0.0
    return [one.to(dtype) for one in found]


def exact(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def check_step(name: str, before: torch.Tensor, after: torch.Tensor, g: torch.Tensor, book: Textbook) -> np.ndarray:
    """Compares the parameter with the book, which then takes the step; returns a bound of the new states' sizes."""
    o, states = book.settings, book.states
    size = Textbook(name, np.zeros(len(book.p)), o, tuple(np.abs(s) for s in states), book.steps)
    coupled = o.weight_decay * np.abs(exact(before)) / o.grad_scale if rule_named(name).decay == "coupled" else 0.0
    size.step(np.abs(exact(g)) + coupled)
    book.step(exact(g))
    moved = np.abs(size.p)
    if name in {"rmsprop", "adagrad"}:
        # Gradient and decay may cancel, above the fraction line and below it.
        moved = 2 * o.lr * o.grad_scale * (np.abs(exact(g)) + coupled) / (np.sqrt(book.states[0]) + o.eps)
    close_to = torch.from_numpy(book.p)
    scale = close_to.abs() * rounding(after.dtype).relative + FP32 * (before.double().abs() + torch.from_numpy(moved))
    if name == "lion":
        mix = o.betas[0] * states[0] + (1 - o.betas[0]) * exact(g) * o.grad_scale
        sure = torch.from_numpy(np.abs(mix) > FP32 * np.abs(states[0]))
        after, close_to, scale = after[sure], close_to[sure], scale[sure]
    close(
        f"{name} step {book.steps}",
        after,
        close_to,
        TOLERANCES["optimizer step"],
        scale + torch.finfo(after.dtype).tiny,
    )
    return np.stack(size.states)


def check_32bit(name: str, steps: int, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    o, p = Settings(), start(dtype)
    states = [torch.zeros(NUMEL) for _ in rule_named(name).signed]
    for t, g in enumerate(gradients(steps, grad_dtype), 1):
        before, book = p.clone(), Textbook(name, exact(p), o, tuple(exact(s) for s in states), t - 1)
        ops.optimizer_step_32bit([p], [g], states, numbers(o, t), name)
        size = check_step(name, before, p, g, book)
        for state, expected, bound in zip(states, book.states, size, strict=True):
            bound = torch.from_numpy(bound)
            close("state", state, torch.from_numpy(expected), TOLERANCES["optimizer step fp32"], bound)


def check_8bit(name: str, steps: int, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    o, p, signed = Settings(), start(dtype), rule_named(name).signed
    codes = [torch.zeros(NUMEL, dtype=torch.uint8) for _ in signed]
    absmax = [torch.zeros(-(-NUMEL // BLOCKSIZE)) for _ in signed]
    maps = [MAPS[one] for one in signed]
    for t, g in enumerate(gradients(steps, grad_dtype), 1):
        values = tuple(
            exact(code)[q.long().numpy()] * exact(a).repeat(BLOCKSIZE)[:NUMEL]
            for q, a, code in zip(codes, absmax, maps, strict=True)
        )
        before, book = p.clone(), Textbook(name, exact(p), o, values, t - 1)
        ops.optimizer_step_8bit([p], [g], codes, absmax, maps, numbers(o, t), BLOCKSIZE, name)
        size = check_step(name, before, p, g, book)
        for q, a, state, bound, code in zip(codes, absmax, book.states, size, maps, strict=True):
            check_codes(q, a, state, bound, code)


def check_codes(q: torch.Tensor, a: torch.Tensor, state: np.ndarray, bound: np.ndarray, code: torch.Tensor) -> None:
    """The codes are those of the exact state, scaled by the absmax that is stored, and that is the block's."""
    pad = -len(state) % BLOCKSIZE
    blocks = np.pad(np.abs(state), (0, pad)).reshape(-1, BLOCKSIZE)
    slack = np.pad(bound, (0, pad)).reshape(-1, BLOCKSIZE).max(axis=1)
    close("absmax", a, torch.from_numpy(blocks.max(axis=1)), TOLERANCES["optimizer step fp32"], torch.from_numpy(slack))
    scale = exact(a).repeat(BLOCKSIZE)[: len(state)]
    allowed = TOLERANCES["nearest slack"].relative + 2 * FP32 * bound / np.where(scale > 0, scale, 1)
    assert (excess(q.long().numpy(), state, scale, exact(code)) <= allowed).all()


def test_every_rule_has_a_textbook(backend: str) -> None:
    assert set(rule_names()) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_200_steps_with_32_bit_states(name: str, backend: str) -> None:
    check_32bit(name, 200, torch.float32, torch.float32)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_200_steps_with_8_bit_states(name: str, backend: str) -> None:
    check_8bit(name, 200, torch.float32, torch.float32)


DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_dtype_of_parameter_and_gradient(
    name: str, dtype: torch.dtype, grad_dtype: torch.dtype, backend: str
) -> None:
    check_32bit(name, 8, dtype, grad_dtype)
    check_8bit(name, 8, dtype, grad_dtype)
