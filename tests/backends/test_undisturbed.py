"""Skipping torch's dispatcher: only where nobody listens to it."""

from __future__ import annotations

import torch

from halfbyte.backends import registry
from halfbyte.nn import LinearNF4
from tests.support.listening import Listener


def test_a_plain_tensor_with_nobody_listening_is_undisturbed() -> None:
    assert registry.undisturbed(torch.zeros(1))


def test_a_subclass_is_not() -> None:
    assert not registry.undisturbed(torch.nn.Parameter(torch.zeros(1)))


def test_a_dispatch_mode_still_hears_the_product_of_a_layer() -> None:
    layer = LinearNF4(64, 32).to("cpu")
    with torch.no_grad(), Listener() as listener:
        layer(torch.zeros(2, 64))
    assert "halfbyte.gemm_4bit.default" in listener.heard


def test_a_transform_sees_no_undisturbed_tensor() -> None:
    seen: list[bool] = []

    def probe(x: torch.Tensor) -> torch.Tensor:
        seen.append(registry.undisturbed(x))
        return x

    torch.func.vmap(probe)(torch.zeros(3, 2))
    assert seen == [False]


def test_both_ways_give_the_same_product() -> None:
    layer = LinearNF4(64, 32).to("cpu")
    x = torch.randn(2, 64)
    with torch.no_grad():
        direct = layer(x)
        with Listener():
            dispatched = layer(x)
    assert torch.equal(direct, dispatched)
