"""A 4-bit layer with a low-rank product beside it: each gradient, and which of them are computed at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte.autograd.low_rank_4bit import low_rank_matmul_4bit
from halfbyte.functional import dequantize_4bit
from halfbyte.nn import Linear4bit
from tests.support.listening import Listener

SCALING = 0.75


def layer_of(seed: int) -> Linear4bit:
    torch.manual_seed(seed)
    return Linear4bit(64, 48, False, torch.float32, quant_type="nf4").to("cpu")


def dense(layer: Linear4bit) -> Tensor:
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def operands() -> list[Tensor]:
    """x, down, up and what stands in x's place."""
    torch.manual_seed(5)
    return [torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 64), (8, 64), (48, 8), (2, 5, 64))]


def expected(weight: Tensor, x: Tensor, down: Tensor, up: Tensor, dropped: Tensor) -> Tensor:
    return x @ weight.t() + SCALING * (dropped @ down.t()) @ up.t()


def test_an_input_without_gradient_costs_no_product_with_the_weight() -> None:
    layer, (x, down, up, _) = layer_of(0), operands()
    product = low_rank_matmul_4bit(x.detach(), layer, down, up, SCALING)
    with Listener() as listener:
        product.sum().backward()
    assert not [name for name in listener.heard if "gemm_4bit_dgrad" in name]
    assert down.grad is not None


def test_a_weight_that_was_replaced_before_the_backward_pass_is_still_the_one_multiplied() -> None:
    layer, (x, down, up, _) = layer_of(0), operands()
    weight = dense(layer)
    product = low_rank_matmul_4bit(x, layer, down, up, SCALING)
    layer.weight = layer_of(1).weight
    (found,) = torch.autograd.grad(product.sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(expected(weight, x, down, up, x).sum(), x)[0])


@pytest.mark.parametrize("wanted", range(4), ids=["x", "down", "up", "dropped"])
def test_one_operand_that_learns_is_enough(wanted: int) -> None:
    layer, given = layer_of(0), [tensor.detach() for tensor in operands()]
    given[wanted].requires_grad_()
    x, down, up, dropped = given
    (found,) = torch.autograd.grad(
        low_rank_matmul_4bit(x, layer, down, up, SCALING, dropped).square().sum(), [given[wanted]]
    )
    (right,) = torch.autograd.grad(expected(dense(layer), x, down, up, dropped).square().sum(), [given[wanted]])
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("without", [None, 0, 3], ids=["all", "no gradient to x", "none to dropped"])
def test_second_derivatives_with_an_input_of_its_own(without: int | None) -> None:
    layer, given = layer_of(0), operands()
    inputs = [tensor for index, tensor in enumerate(given) if index != without]
    if without is not None:
        given[without] = given[without].detach()
    x, down, up, dropped = given

    def second(product: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(product.pow(3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)

    found = second(low_rank_matmul_4bit(x, layer, down, up, SCALING, dropped))
    for own, right in zip(found, second(expected(dense(layer), x, down, up, dropped)), strict=True):
        assert (own - right).norm() <= 1e-5 * right.norm()


def test_second_derivatives_without_a_gradient_to_x() -> None:
    layer, (x, down, up, _) = layer_of(0), operands()
    x = x.detach()

    def second(product: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(product.pow(3).sum(), [down, up], create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), [down, up])

    found = second(low_rank_matmul_4bit(x, layer, down, up, SCALING))
    for own, right in zip(found, second(expected(dense(layer), x, down, up, x)), strict=True):
        assert (own - right).norm() <= 1e-5 * right.norm()


def test_second_derivatives_of_fp32_factors_beside_a_bf16_product() -> None:
    layer, (x, down, up, dropped) = layer_of(0), operands()
    layer.compute_dtype = torch.bfloat16
    product = low_rank_matmul_4bit(x, layer, down, up, SCALING, dropped)
    first = torch.autograd.grad(product.pow(3).sum(), [x, down, up, dropped], create_graph=True)
    found = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), [x, down, up, dropped])
    assert [each.dtype for each in (*first, *found)] == [torch.float32] * 8


def test_without_gradients_an_input_of_its_own_is_used() -> None:
    layer, (x, down, up, dropped) = layer_of(0), operands()
    with torch.no_grad():
        found = low_rank_matmul_4bit(x, layer, down, up, SCALING, dropped)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected(dense(layer), x, down, up, dropped).detach(), rtol=1e-4, atol=1e-4)
