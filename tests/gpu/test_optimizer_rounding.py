"""Codes, scales and random rounding of optimizer steps on a GPU are the CPU's, to the bit."""

from __future__ import annotations

import pytest
import torch

import halfbyte.functional as F
from halfbyte import optim
from halfbyte.rules import hyper, rule_named

pytestmark = pytest.mark.gpu
ops = torch.ops.halfbyte


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
