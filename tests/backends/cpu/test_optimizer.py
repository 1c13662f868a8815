"""CPU optimizer steps are the reference's, bit for bit: every rule, dtype, tail, rounding and hard gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import halfbyte.functional as F
from halfbyte.backends import explain
from halfbyte.backends.cpu import host
from halfbyte.rules import hyper, rule_named, rule_names

ops = torch.ops.halfbyte
MAPS = {True: F.create_dynamic_map(), False: F.create_dynamic_map(signed=False)}
STEPS, BLOCKSIZE = 10, 256
LEVELS = [level.name for level in host.levels()]


def gradients(numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(numel)
    found: list[torch.Tensor] = []
    for step in range(STEPS):
        g = torch.randn(numel, generator=generator) * torch.logspace(-3, 3, max(numel, 2))[:numel]
        g[::17] = 0.0
        if step == 4 and numel > 40:
            g[40], g[numel - 1], g[numel // 2] = float("nan"), float("inf"), 3e38
        found.append(g.to(dtype))
    return found


def run(
    rule: str, numel: int, dtype: torch.dtype, grad: torch.dtype, blocksize: int, seed: int, skip: bool
) -> list[torch.Tensor]:
    signed = rule_named(rule).signed
    p = torch.linspace(-2, 2, numel).to(dtype)
    q = p.clone()
    fp32 = [torch.zeros(numel) for _ in signed]
    codes = [torch.zeros(numel, dtype=torch.uint8) for _ in signed]
    absmax = [torch.zeros(-(-numel // blocksize)) for _ in signed]
    maps = [MAPS[one] for one in signed]
    for t, g in enumerate(gradients(numel, grad), 1):
        h = torch.tensor(
            hyper(
                lr=1e-2, beta1=0.9, beta2=0.99, beta3=0.999, alpha=2.0, eps=1e-8, weight_decay=0.1, step=t,
                grad_scale=0.5, update_scale=0.75,
            )
        )  # fmt: skip
        ops.optimizer_step_32bit([p], [g], fp32, h, rule, skip, seed)
        ops.optimizer_step_8bit([q], [g], codes, absmax, maps, h, blocksize, rule, skip, seed)
    return [p, q, *fp32, *codes, *absmax]


def check(only_backend: Callable[[str], None], rule: str, *arguments: object) -> None:
    only_backend("reference")
    expected = run(rule, *arguments)
    only_backend("cpu")
    for ours, theirs in zip(run(rule, *arguments), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", rule_names())
def test_every_rule_and_dtype(rule: str, dtype: torch.dtype, only_backend: Callable[[str], None]) -> None:
    check(only_backend, rule, 5003, dtype, dtype, 256, -1, False)


@pytest.mark.parametrize("numel", [0, 1, 7, 255, 256, 257, 2048, 70_001])
def test_every_length(numel: int, only_backend: Callable[[str], None]) -> None:
    check(only_backend, "adam", numel, torch.float32, torch.float32, 256, -1, False)


@pytest.mark.parametrize("rule", ["adam", "ademamix", "lion"])
def test_old_blocks_of_2048(rule: str, only_backend: Callable[[str], None]) -> None:
    check(only_backend, rule, 5003, torch.float32, torch.float32, 2048, -1, False)


@pytest.mark.parametrize("rule", rule_names())
def test_zero_gradients_skipped(rule: str, only_backend: Callable[[str], None]) -> None:
    check(only_backend, rule, 1000, torch.float32, torch.float32, 256, -1, True)


@pytest.mark.parametrize("rule", ["adam", "momentum"])
def test_random_rounding_draws_the_same(rule: str, only_backend: Callable[[str], None]) -> None:
    check(only_backend, rule, 5003, torch.bfloat16, torch.float32, 256, 12345, False)
    check(only_backend, rule, 5003, torch.float32, torch.bfloat16, 256, 12345, False)


def check_scales(only_backend: Callable[[str], None], rule: str) -> None:
    scales = torch.tensor([1.0, float("nan"), float("inf"), -1.0, 1e-30, 1e-38, 1e-42, 0.0, 3e38])
    numel, signed = BLOCKSIZE * scales.numel(), rule_named(rule).signed
    h = torch.tensor(hyper(lr=1e-2, beta1=0.9, beta2=0.99, beta3=0.999, alpha=2.0, eps=1e-8, step=3))
    for largest in (1e-3, 0.0):  # without gradients tiny scales stay tiny
        found: list[list[torch.Tensor]] = []
        for backend in ("reference", "cpu"):
            only_backend(backend)
            p, g = torch.linspace(-2, 2, numel), torch.linspace(-largest, largest, numel)
            codes = [torch.arange(numel).to(torch.uint8) for _ in signed]
            absmax, maps = [scales.clone() for _ in signed], [MAPS[one] for one in signed]
            ops.optimizer_step_8bit([p], [g], codes, absmax, maps, h, BLOCKSIZE, rule)
            found.append([p, *codes, *absmax])
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", rule_names())
def test_damaged_and_tiny_scales(rule: str, only_backend: Callable[[str], None]) -> None:
    """Whatever bytes and scales a state file holds, nothing is read out of bounds and the result is the reference's."""
    check_scales(only_backend, rule)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_this_machine(
    level: str, only_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "level", lambda: host.level_named(level))
    check(only_backend, "adam", 1003, torch.bfloat16, torch.float16, 256, -1, False)


def test_a_map_that_it_cannot_take_is_left_to_the_reference() -> None:
    p, g, codes, absmax = torch.ones(300), torch.ones(300), torch.zeros(300, dtype=torch.uint8), torch.zeros(2)
    h = torch.tensor(hyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, step=1))
    flat = F.create_linear_map(total_bits=4)
    said = {
        one.backend: one.reason
        for one in explain("optimizer_step_8bit", [p], [g], [codes], [absmax], [flat], h, 256, "lion")
    }
    assert said["cpu"] == "the code map does not rise from value to value"
    assert said["reference"] is None
    ops.optimizer_step_8bit([p], [g], [codes], [absmax], [flat], h, 256, "lion")
    assert (p < 1).all()
