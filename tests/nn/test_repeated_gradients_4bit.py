"""Gradients that a 4-bit layer repeats: learned and taken for the weight, dtype and shape that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from halfbyte.functional import dequantize_4bit
from halfbyte.nn import Linear4bit
from tests.support.changing_4bit import (
    replace_data,
    replace_data_of_the_second_level,
    replace_offset,
    replace_weight,
)
from tests.support.listening import Listener
from tests.support.repeating import X, linear_4bit


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


def test_gradients_of_a_weight_that_was_replaced_since_are_not_learned(
    repeats: list[torch.Size], repeated_gradients: list[torch.Size]
) -> None:
    layer, x = linear_4bit(), X.clone().requires_grad_()
    layer(X)
    product = layer(x)
    assert repeats == [X.shape]
    replace_weight(layer)
    layer(X)
    product.sum().backward()  # by the ordinary way: the layer has another weight now
    torch.testing.assert_close(gradients(layer, X), gradients(layer, X))
    assert repeated_gradients == [product.shape]


@pytest.mark.usefixtures("repeats")
def test_gradients_in_another_dtype_than_the_last_product_are_not_learned(
    repeated_gradients: list[torch.Size],
) -> None:
    layer, x, low = linear_4bit(bias=False), X.clone().requires_grad_(), X.to(torch.bfloat16)
    layer.compute_dtype = None  # the activations' own
    layer(x)
    product = layer(x)
    layer(low)
    product.sum().backward()
    assert gradients(layer, low)[0].dtype == torch.bfloat16
    assert repeated_gradients == []


@pytest.mark.usefixtures("repeats")
def test_gradients_that_a_mode_hears_are_not_learned(repeated_gradients: list[torch.Size]) -> None:
    layer, x = linear_4bit(bias=False), X.clone().requires_grad_()
    layer(x)
    product = layer(x)
    with Listener():
        product.sum().backward()
    gradients(layer, X)
    assert repeated_gradients == []


@pytest.mark.usefixtures("repeats")
def test_gradients_that_are_differentiated_themselves_are_not_learned(repeated_gradients: list[torch.Size]) -> None:
    layer, x = linear_4bit(bias=False), X.clone().requires_grad_()
    layer(x)
    torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    gradients(layer, X)
    assert repeated_gradients == []
    gradients(layer, X)
    assert len(repeated_gradients) == 1


@pytest.mark.usefixtures("repeats")
def test_a_given_gradient_that_learns_is_repeated_in_a_plain_backward_pass(
    repeated_gradients: list[torch.Size],
) -> None:
    layer, x = linear_4bit(bias=False), X.clone().requires_grad_()
    for _ in range(3):
        product = layer(x)
        product.backward(torch.ones_like(product).requires_grad_())
    assert len(repeated_gradients) == 1


def test_the_backend_is_asked_once_for_gradients_of_each_shape(asked: list[Any]) -> None:
    layer, x = linear_4bit(bias=False), X.clone().requires_grad_()
    for _ in range(4):
        layer(x).sum().backward()
    assert [op for op, *_ in asked] == ["gemm_4bit", "gemm_4bit_dgrad"]


@pytest.mark.usefixtures("repeats")
def test_gradients_are_repeated_where_hooks_copy_what_is_saved(repeated_gradients: list[torch.Size]) -> None:
    layer, x = linear_4bit(bias=False), X.clone().requires_grad_()
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.data.clone(), lambda copied: copied):
            product = layer(x)
        product.sum().backward()
    assert repeated_gradients == [product.shape]


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
