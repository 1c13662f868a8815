"""Gradients of products that a layer of 4 or 8 bits repeats: those of the ordinary way, and nothing more computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from tests.support.listening import Listener
from tests.support.repeating import N, X, misaligned, ordinary


def test_a_bias_that_learns_is_enough_for_gradients(layer_of: Callable[..., Any], repeats: list[torch.Size]) -> None:
    layer = layer_of()
    for _ in range(2):
        layer.bias.grad = None
        layer(X).sum().backward()
        torch.testing.assert_close(layer.bias.grad, torch.full((N,), float(len(X))))
    assert repeats == [X.shape]


def heard_in_the_backward_pass(layer: Any, x: Tensor) -> str:
    """Names of the ops of which a repeated product's gradients are made."""
    layer(x)
    product = layer(x)
    with Listener() as listener:
        product.backward(torch.ones_like(product))
    return " ".join(listener.heard)


@pytest.mark.usefixtures("repeats")
def test_a_bias_that_learns_alone_asks_for_no_product_with_the_weight(layer_of: Callable[..., Any]) -> None:
    heard = heard_in_the_backward_pass(layer_of(), X)
    assert "aten.sum" in heard
    assert "dgrad" not in heard


@pytest.mark.usefixtures("repeats")
def test_gradients_to_a_frozen_bias_are_not_summed(layer_of: Callable[..., Any]) -> None:
    layer = layer_of()
    layer.bias.requires_grad_(False)
    heard = heard_in_the_backward_pass(layer, X.clone().requires_grad_())
    assert "dgrad" in heard
    assert "aten.sum" not in heard


def test_misaligned_activations_that_learn_take_the_ordinary_way(
    layer_of: Callable[..., Any], repeats: list[torch.Size]
) -> None:
    layer, x, off = layer_of(), X.clone().requires_grad_(), misaligned(X).requires_grad_()
    expected, found = layer(x), layer(off)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(off.grad, x.grad)
    assert repeats == []


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.usefixtures("repeats")
def test_the_repetition_of_a_first_pass_saves_what_that_did(layer_of: Callable[..., Any], aligned: bool) -> None:
    layers, x = (layer_of(), layer_of(1)), X.clone().requires_grad_()

    def both(x: Tensor) -> Tensor:  # what the first saves too much is taken for what the second saves
        return layers[0](x) + layers[1](x)

    # The first pass takes the ordinary way, its repetition in the backward pass the short one.
    torch.utils.checkpoint.checkpoint(both, x if aligned else misaligned(x), use_reentrant=False).sum().backward()
    found, x.grad = x.grad, None
    sum(ordinary(layer, x) for layer in layers).sum().backward()
    torch.testing.assert_close(found, x.grad)
