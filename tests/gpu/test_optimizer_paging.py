"""Paged optimizers on a GPU: steps as others make, memory of the host, which is kept as long as it is used."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from halfbyte import optim
from halfbyte.optim import paging
from tests.support.optimizers import many

pytestmark = pytest.mark.gpu


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
