"""The family of optimizers by name, and small models and parameters that they step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from halfbyte import optim

__all__ = ["FAMILY", "assert_equal", "backward", "each", "make", "many", "model", "run"]


FAMILY = {
    name: getattr(optim, name)
    for name in optim.__all__
    if isinstance(getattr(optim, name), type)
    and issubclass(getattr(optim, name), optim.Optimizer8bit)
    and not name.startswith("Optimizer")
}
each = pytest.mark.parametrize("name", FAMILY)


def settings(name: str) -> dict[str, Any]:
    return {"lr": 1e-2, "momentum": 0.9} if name.startswith(("SGD", "LARS")) else {"lr": 1e-2}


def make(name: str, params: Any, **more: Any) -> optim.Optimizer8bit:
    return FAMILY[name](params, **{**settings(name), **more})


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(70, 60), torch.nn.GELU(), torch.nn.Linear(60, 80))


def backward(net: torch.nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    loss = (net(torch.randn(16, 70, generator=generator)) - torch.randn(16, 80, generator=generator)).square().mean()
    loss.backward()
    return loss


def run(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for seed in steps:
        optimizer.zero_grad()
        backward(net, seed)
        optimizer.step()


def assert_equal(left: torch.nn.Module, right: torch.nn.Module) -> None:
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b)


def many(count: int, numel: int = 5000) -> list[torch.nn.Parameter]:
    """Parameters on the GPU, with gradients."""
    found = [torch.nn.Parameter(torch.randn(numel, device="cuda")) for _ in range(count)]
    for p in found:
        p.grad = torch.randn_like(p)
    return found
