"""The short way through an 8-bit layer: left when its weight, scales or threshold changed; with gradients, too."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from halfbyte.errors import QuantStateMissingError
from halfbyte.nn import Int8Params, Linear8bitLt
from tests.support.repeating import K, N, X, linear_8bit, ordinary


def replace_weight(layer: Linear8bitLt) -> None:
    layer.weight = linear_8bit(1).weight


def replace_data(layer: Linear8bitLt) -> None:
    layer.weight.data = linear_8bit(1).weight.data


def narrow_in_place(layer: Linear8bitLt) -> None:
    layer.weight.data = layer.weight.data[: N // 2]
    layer.weight.SCB = layer.weight.SCB[: N // 2]
    layer.bias = None


def narrow_data_in_place(layer: Linear8bitLt) -> None:
    layer.weight.data = layer.weight.data[: N // 2]
    layer.weight.SCB.data = layer.weight.SCB.data[: N // 2]
    layer.bias.data = layer.bias.data[: N // 2]


def replace_scales(layer: Linear8bitLt) -> None:
    layer.weight.SCB = layer.weight.SCB * 2


def replace_data_of_the_scales(layer: Linear8bitLt) -> None:
    layer.weight.SCB.data = layer.weight.SCB.data * 2


def write_to_the_state(layer: Linear8bitLt) -> None:
    layer.state.CB = linear_8bit(1).weight.CB


def write_scales_to_the_state(layer: Linear8bitLt) -> None:
    layer.state.SCB = layer.state.SCB * 2


def replace_threshold(layer: Linear8bitLt) -> None:
    layer.state.threshold = 0.0


def load(layer: Linear8bitLt) -> None:
    layer.load_state_dict(linear_8bit(1).state_dict())


def merge(layer: Linear8bitLt) -> None:
    layer.weight = Int8Params(torch.randn(N, K), requires_grad=False).to("cpu")
    layer.state.reset_grads()


CHANGES = [
    replace_weight, replace_data, narrow_in_place, narrow_data_in_place, replace_scales, replace_data_of_the_scales,
    write_to_the_state, write_scales_to_the_state, replace_threshold, load, merge,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.usefixtures("no_grad")
def test_a_layer_that_changed_computes_with_what_it_has_now(
    repeats: list[torch.Size], change: Callable[[Linear8bitLt], None]
) -> None:
    layer = linear_8bit()
    before = layer(X), layer(X)
    assert len(repeats) == 1
    change(layer)
    now = layer(X)
    assert torch.equal(now, ordinary(layer, X))
    assert now.shape != before[1].shape or not torch.allclose(now, before[1])
    assert len(repeats) == 1
    assert torch.equal(layer(X), now)
    assert len(repeats) == 2


def lose_scales(layer: Linear8bitLt) -> None:
    layer.weight.SCB = None


def lose_weight(layer: Linear8bitLt) -> None:
    codes = layer.weight.data
    del layer.weight
    layer.weight = codes.float()  # no parameter any more


@pytest.mark.parametrize("change", [lose_scales, lose_weight], ids=lambda change: change.__name__)
@pytest.mark.usefixtures("no_grad", "repeats")
def test_scales_that_are_gone_are_missed_as_in_the_ordinary_way(change: Callable[[Linear8bitLt], None]) -> None:
    layer = linear_8bit()
    layer(X), layer(X)
    change(layer)
    with pytest.raises(QuantStateMissingError, match="without their scales"):
        layer(X)


@pytest.mark.usefixtures("no_grad")
def test_a_weight_whose_codes_became_floats_is_not_repeated(repeats: list[torch.Size]) -> None:
    layer = linear_8bit()
    layer.state.has_fp16_weights = True
    layer.weight.data = torch.randn(N, K)  # its scales stay
    for _ in range(3):
        torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=0, atol=0)
    assert repeats == []


@pytest.mark.usefixtures("no_grad")
def test_the_backend_is_asked_with_plain_tensors(asked: list[Any]) -> None:
    linear_8bit()(X)
    ((_, *given),) = asked
    assert {type(each) for each in given if isinstance(each, Tensor)} == {Tensor, torch.nn.Parameter}  # that: the bias


@pytest.mark.usefixtures("no_grad")
def test_another_dtype_of_activations_takes_the_ordinary_way(repeats: list[torch.Size]) -> None:
    layer = linear_8bit()
    layer(X)
    expected = ordinary(layer, X.to(torch.bfloat16))
    assert torch.equal(layer(X.to(torch.bfloat16)), expected)
    assert repeats == []


def gradients(layer: Linear8bitLt, x: Tensor, weight: Tensor) -> list[Tensor]:
    given = x.clone().requires_grad_()
    (layer(given) * weight).sum().backward()
    assert layer.bias.grad is not None
    found = [given.grad, layer.bias.grad]
    layer.bias.grad = None
    return found


def test_gradients_are_those_of_the_ordinary_way(repeats: list[torch.Size]) -> None:
    layer, weight = linear_8bit(), torch.randn(3, N)
    expected = gradients(layer, X, weight)
    assert repeats == []
    for found in (gradients(layer, X, weight), gradients(layer, X, weight)):
        assert all(map(torch.equal, found, expected))
    assert repeats == [X.shape, X.shape]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_learn_alike(repeats: list[torch.Size], reentrant: bool) -> None:
    layer, weight = linear_8bit(), torch.randn(3, N)
    expected = gradients(layer, X, weight)
    x = X.clone().requires_grad_()
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    (out * weight).sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert len(repeats) == 2


def test_gradients_of_an_fp32_bias_beside_16_bit_activations_are_summed_in_fp32(repeats: list[torch.Size]) -> None:
    layer, x = linear_8bit(), torch.zeros(257, K, dtype=torch.bfloat16)
    for _ in range(2):
        layer.bias.grad = None
        layer(x).sum().backward()
    assert repeats == [x.shape]
    assert torch.equal(layer.bias.grad, torch.full((N,), 257.0))  # in bf16: 256


@pytest.mark.usefixtures("repeats")
def test_second_derivatives_pass_through() -> None:
    layer = linear_8bit(bias=False)
    for _ in range(3):
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        weight = layer.weight.CB.float() * layer.weight.SCB[:, None] / 127
        torch.testing.assert_close(second, 2 * (weight.sum(1) @ weight).expand_as(X), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("no_grad")
def test_training_mode_still_shows_in_the_state(repeats: list[torch.Size]) -> None:
    layer = linear_8bit().train()
    layer(X)
    layer.eval()(X)
    assert repeats == [X.shape]
    assert layer.state.is_training is False


@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_replaced_weight_is_freed() -> None:
    layer = linear_8bit()
    layer(X), layer(X)
    old = weakref.ref(layer.weight), weakref.ref(layer.weight.SCB)
    replace_weight(layer)
    gc.collect()
    assert [reference() for reference in old] == [None, None]
