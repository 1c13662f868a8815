"""The short way through a 4-bit layer: left when its weight, its scales or its dtype changed; with gradients, too."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from halfbyte.functional import dequantize_4bit
from halfbyte.nn import Linear4bit
from tests.support.listening import Listener
from tests.support.repeating import X, linear_4bit, ordinary


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.usefixtures("no_grad")
def test_plain_and_nested_scales_are_repeated(repeats: list[torch.Size], nested: bool) -> None:
    layer = linear_4bit(nested=nested)
    first = layer(X)
    assert repeats == []
    torch.testing.assert_close(layer(X), first)
    assert repeats == [X.shape]


def replace_weight(layer: Linear4bit) -> None:
    layer.weight = linear_4bit(1).weight


def replace_data(layer: Linear4bit) -> None:
    layer.weight.data = linear_4bit(1).weight.data


def replace_state(layer: Linear4bit) -> None:
    layer.weight.quant_state = linear_4bit(1).weight.quant_state


def replace_absmax(layer: Linear4bit) -> None:
    state = layer.weight.quant_state
    state.absmax = torch.roll(state.absmax, 1)


def replace_offset(layer: Linear4bit) -> None:
    layer.weight.quant_state.offset = torch.tensor(1.5)


def replace_second_level(layer: Linear4bit) -> None:
    layer.weight.quant_state.state2.absmax = layer.weight.quant_state.state2.absmax * 2


def replace_data_of_the_second_level(layer: Linear4bit) -> None:
    second = layer.weight.quant_state.state2
    second.absmax.data = second.absmax.data * 2


def replace_data_of_the_codes_levels(layer: Linear4bit) -> None:
    second = layer.weight.quant_state.state2
    second.code.data = second.code.data * 2


def replace_data_of_the_offset(layer: Linear4bit) -> None:
    layer.weight.quant_state.offset.data = torch.tensor(1.5)


def replace_kind(layer: Linear4bit) -> None:
    layer.weight.quant_state.quant_type = "fp4"


def load(layer: Linear4bit) -> None:
    layer.load_state_dict(linear_4bit(1).state_dict())


def load_assigned(layer: Linear4bit) -> None:
    layer.load_state_dict(linear_4bit(1).state_dict(), assign=True)


CHANGES = [
    replace_weight, replace_data, replace_state, replace_absmax, replace_offset, replace_second_level,
    replace_data_of_the_second_level, replace_data_of_the_codes_levels, replace_data_of_the_offset, replace_kind,
    load, load_assigned,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.usefixtures("no_grad")
def test_a_layer_that_changed_computes_with_what_it_has_now(
    repeats: list[torch.Size], change: Callable[[Linear4bit], None]
) -> None:
    layer = linear_4bit()
    before = layer(X), layer(X)
    assert len(repeats) == 1
    change(layer)
    now = layer(X)
    torch.testing.assert_close(now, ordinary(layer, X), rtol=0, atol=0)
    assert not torch.allclose(now, before[1])
    assert len(repeats) == 1
    torch.testing.assert_close(layer(X), now)
    assert len(repeats) == 2


@pytest.mark.usefixtures("no_grad")
def test_scales_that_were_computed_for_one_call_are_not_repeated(repeats: list[torch.Size]) -> None:
    layer = linear_4bit()
    state = layer.weight.quant_state
    state.state2.blocksize = 64  # no kernel decodes that: scales are decoded before each call, and freed after it
    first = layer(X)
    torch.testing.assert_close(layer(X), first, rtol=0, atol=0)
    assert repeats == []


@pytest.mark.usefixtures("no_grad")
def test_another_compute_dtype_is_computed_in(repeats: list[torch.Size]) -> None:
    layer = linear_4bit()
    layer(X)
    layer.compute_dtype = torch.bfloat16
    torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=0, atol=0)
    assert repeats == []


@pytest.mark.usefixtures("no_grad")
def test_activations_that_are_cast_first_are_repeated(repeats: list[torch.Size]) -> None:
    layer = linear_4bit(bias=False)
    layer.compute_dtype = torch.bfloat16
    first = layer(X)
    assert first.dtype == torch.float32
    torch.testing.assert_close(layer(X), first, rtol=0, atol=0)
    assert repeats == [X.shape]


@pytest.mark.usefixtures("no_grad")
def test_another_dtype_of_activations_takes_the_ordinary_way(repeats: list[torch.Size]) -> None:
    layer = linear_4bit(bias=False)
    layer.compute_dtype = None  # the activations' own
    layer(X.to(torch.bfloat16))
    assert layer(X.to(torch.float16)).dtype == torch.float16
    assert repeats == []


def gradients(layer: Linear4bit, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of the sum of the product's squares, to the input and the bias."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert x.grad is not None
    return x.grad, None if layer.bias is None else layer.bias.grad


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_that_wants_gradients_is_repeated_with_them(
    repeats: list[torch.Size], repeated_gradients: list[torch.Size], bias: bool
) -> None:
    layer = linear_4bit(bias=bias)
    first, second, third = (gradients(layer, X) for _ in range(3))
    assert repeats == [X.shape] * 2
    assert repeated_gradients == [torch.Size((3, 32))]  # the second pass was the first whose gradient was looked for
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(third, first)


@pytest.mark.usefixtures("repeats")
def test_strided_gradients_are_repeated(repeated_gradients: list[torch.Size]) -> None:
    layer, x = linear_4bit(bias=False), X.clone().requires_grad_()
    for _ in range(3):
        (found,) = torch.autograd.grad(layer(x).sum(), x)  # of a sum: one value, expanded
    torch.testing.assert_close(found, torch.ones(3, 32) @ reference_weight(layer))
    assert repeated_gradients == [torch.Size((3, 32))]


@pytest.mark.parametrize("change", [replace_weight, replace_data, replace_offset, replace_data_of_the_second_level])
@pytest.mark.usefixtures("repeats")
def test_gradients_are_those_of_the_weight_that_was_multiplied(
    repeated_gradients: list[torch.Size], change: Callable[[Linear4bit], None]
) -> None:
    layer, twin = linear_4bit(), linear_4bit()
    for _ in range(3):
        gradients(layer, X)
    assert len(repeated_gradients) == 1
    change(layer)
    change(twin)
    torch.testing.assert_close(gradients(layer, X), gradients(twin, X))
    assert len(repeated_gradients) == 1


@pytest.mark.usefixtures("repeats", "repeated_gradients")
def test_a_weight_that_was_replaced_before_the_backward_pass_is_still_the_one_multiplied() -> None:
    layer = linear_4bit()
    gradients(layer, X), gradients(layer, X)
    expected = gradients(layer, X)
    x = X.clone().requires_grad_()
    product = layer(x)
    replace_weight(layer)
    product.square().sum().backward()
    torch.testing.assert_close(x.grad, expected[0])


@pytest.mark.usefixtures("repeats", "repeated_gradients")
def test_gradients_of_another_weight_that_were_learned_since_are_not_taken() -> None:
    layer, x = linear_4bit(), X.clone().requires_grad_()
    expected = gradients(layer, X)[0]
    product = layer(x)
    replace_weight(layer)
    for _ in range(3):
        gradients(layer, X)
    product.square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.usefixtures("repeats")
def test_a_gradient_in_another_dtype_than_the_last_product_takes_the_ordinary_way(
    repeated_gradients: list[torch.Size],
) -> None:
    layer, x = linear_4bit(bias=False), X.clone().requires_grad_()
    layer.compute_dtype = None  # the activations' own
    layer(x)
    product = layer(x)
    for _ in range(3):
        gradients(layer, X.to(torch.bfloat16))
    assert repeated_gradients
    repeated_gradients.clear()
    product.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 32) @ reference_weight(layer))
    assert repeated_gradients == []


@pytest.mark.usefixtures("repeats")
def test_a_listening_mode_hears_the_gradients_op(repeated_gradients: list[torch.Size]) -> None:
    layer, x = linear_4bit(bias=False), X.clone().requires_grad_()
    for _ in range(3):
        gradients(layer, X)
    assert repeated_gradients
    repeated_gradients.clear()
    product = layer(x)
    with Listener() as listener:
        product.sum().backward()
    assert any("gemm_4bit_dgrad" in name for name in listener.heard)
    assert repeated_gradients == []


@pytest.mark.usefixtures("repeats", "repeated_gradients")
def test_a_checkpointed_product_saves_the_same_when_it_is_repeated() -> None:
    layer = linear_4bit(bias=False)
    expected = gradients(linear_4bit(bias=False), X)[0]
    for _ in range(3):
        x = X.clone().requires_grad_()
        # The first pass takes the ordinary way, its repetition in the backward pass the short one.
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        torch.testing.assert_close(x.grad, expected)


@pytest.mark.usefixtures("repeats", "repeated_gradients")
def test_repeated_products_have_second_derivatives() -> None:
    layer, x = linear_4bit(bias=False), X.clone().requires_grad_()
    for _ in range(3):
        gradients(layer, X)
    for _ in range(3):
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    weight = reference_weight(layer)
    y = X @ weight.t()
    torch.testing.assert_close(second, (6 * y * (torch.ones_like(X) @ weight.t())) @ weight)


def reference_weight(layer: Linear4bit) -> Tensor:
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_whole_layer_is_saved_and_loaded() -> None:
    layer = linear_4bit()
    layer(X), layer(X)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(X), layer(X))


@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_replaced_weight_is_freed() -> None:
    layer = linear_4bit()
    layer(X), layer(X)
    old = weakref.ref(layer.weight), weakref.ref(layer.weight.quant_state)
    replace_weight(layer)
    layer.quant_state = layer.weight.quant_state
    gc.collect()
    assert [reference() for reference in old] == [None, None]


@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_layer_is_exported_after_eager_calls() -> None:
    layer = linear_4bit()
    layer(X), layer(X)
    program = torch.export.export(layer, (X,))
    assert any("gemm_4bit" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(X), layer(X))
