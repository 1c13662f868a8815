"""LoRA on a 4-bit layer in one step computes what peft's own forward does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from halfbyte.integrations import peft_lora
from tests.integrations.lora_layers import Doubled, X, close, lora, ordinary, results
from tests.support.listening import Listener


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_product_and_gradients_are_those_of_peft(lora_steps: list[torch.Size], bias: bool, dropout: float) -> None:
    layer = lora(bias=bias, lora_dropout=dropout)
    found, expected = (results(call, layer, X) for call in (type(layer).forward, ordinary))
    assert lora_steps == [X.shape]
    close(found, expected)


def test_in_bf16_it_is_no_further_from_fp32_than_peft(lora_steps: list[torch.Size]) -> None:
    layer, exact = lora(torch.bfloat16), lora()
    for name in ("lora_A", "lora_B"):
        exact._modules[name]["default"].weight.data = layer._modules[name]["default"].weight.data.float()
    x = X.to(torch.bfloat16)
    expected = results(ordinary, exact, x.float())
    ours, theirs = (results(call, layer, x) for call in (type(layer).forward, ordinary))
    assert lora_steps == [X.shape]
    for own, other, right in zip(ours, theirs, expected, strict=True):
        assert (own.float() - right).norm() <= 1.05 * (other.float() - right).norm()


def test_without_gradients_it_is_one_step_too(lora_steps: list[torch.Size]) -> None:
    layer = lora().eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=1e-5, atol=1e-5)
    assert lora_steps == [X.shape]


def test_dropout_is_off_in_evaluation(lora_steps: list[torch.Size]) -> None:
    layer = lora(lora_dropout=0.5).eval()
    torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=1e-5, atol=1e-5)
    assert lora_steps == [X.shape]


def test_dropout_that_is_off_is_not_called(lora_steps: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda *call: heard.append(call))
    lora(lora_dropout=0.5).eval()(X)
    assert (lora_steps, heard) == ([X.shape], [])


def test_dropout_that_was_left_on_drops_in_evaluation(lora_steps: list[torch.Size]) -> None:
    layer = lora(lora_dropout=0.5).eval()
    layer.lora_dropout.train()
    found, expected = (results(call, layer, X) for call in (type(layer).forward, ordinary))
    close(found, expected)
    assert lora_steps == [X.shape]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_hooks_of_the_dropout_are_called(lora_steps: list[torch.Size], dropout: float) -> None:
    layer = lora(lora_dropout=dropout).eval()
    layer.lora_dropout["default"].register_forward_hook(lambda module, args, out: out * 2)  # noqa: ARG005
    torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=1e-5, atol=1e-5)
    assert lora_steps == [X.shape]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_under_autocast_an_fp32_adapter_computes_in_bf16_as_in_peft(
    lora_steps: list[torch.Size], dtype: torch.dtype
) -> None:
    layer = lora(torch.bfloat16)
    for name in ("lora_A", "lora_B"):
        layer._modules[name].float()
    x = X.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (results(call, layer, x) for call in (type(layer).forward, ordinary))
    assert lora_steps == [X.shape]
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    close(found, expected, 0.01)


def test_under_autocast_fp32_activations_are_no_further_from_fp32_than_in_peft(lora_steps: list[torch.Size]) -> None:
    layer, exact = lora(torch.bfloat16, lora_dropout=0.3), lora(lora_dropout=0.3)
    for name in ("lora_A", "lora_B"):
        layer._modules[name].float()
        exact._modules[name]["default"].weight.data = layer._modules[name]["default"].weight.data
    expected = results(ordinary, exact, X)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (results(call, layer, X) for call in (type(layer).forward, ordinary))
    assert lora_steps == [X.shape]
    for own, other, right in zip(ours, theirs, expected, strict=True):
        assert (own.float() - right).norm() <= 1.05 * (other.float() - right).norm()


def test_checkpointing_changes_nothing(lora_steps: list[torch.Size]) -> None:
    def checkpointed(layer: Any, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    layer = lora(lora_dropout=0.3)
    torch.testing.assert_close(results(checkpointed, layer, X), results(type(layer).forward, layer, X))
    assert len(lora_steps) == 3


def test_second_derivatives_are_those_of_peft(lora_steps: list[torch.Size]) -> None:
    layer = lora()

    def second(call: Callable[[Any, Tensor], Tensor]) -> list[Tensor]:
        x = X.clone().requires_grad_()
        inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        first = torch.autograd.grad(call(layer, x).pow(3).sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs))

    close(second(type(layer).forward), second(ordinary), 1e-5)
    assert lora_steps == [X.shape]


@pytest.mark.parametrize("training", [False, True])
def test_a_dropout_of_ones_own_is_called(lora_steps: list[torch.Size], training: bool) -> None:
    layer = lora(lora_dropout=0.5).train(training)
    layer.lora_dropout["default"] = Doubled()
    torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=1e-5, atol=1e-5)
    assert lora_steps == [X.shape]


def test_a_weight_that_a_wrapper_replaced_gets_its_scales_back(lora_steps: list[torch.Size]) -> None:
    layer = lora()
    expected = results(ordinary, layer, X)
    layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight.data, requires_grad=False)
    close(results(type(layer).forward, layer, X), expected)
    assert lora_steps == [X.shape]


def test_a_single_row_without_a_batch_has_second_derivatives() -> None:
    layer, row = lora(), X[0, 0]
    for_all = lambda call: torch.autograd.functional.hessian(lambda x: call(layer, x).pow(3).sum(), row)  # noqa: E731
    torch.testing.assert_close(for_all(type(layer).forward), for_all(ordinary))


def test_a_second_import_extends_no_further() -> None:
    layer = type(lora())
    before = layer.forward
    peft_lora.extend()
    assert layer.forward is before


def test_modes_hear_every_op(lora_steps: list[torch.Size]) -> None:
    layer = lora()
    expected = layer(X)
    with Listener():
        torch.testing.assert_close(layer(X), expected)
    assert len(lora_steps) == 2


def test_copies_are_extended_with_their_class(lora_steps: list[torch.Size]) -> None:
    layer = lora()
    torch.testing.assert_close(copy.deepcopy(layer)(X), layer(X), rtol=0, atol=0)
    assert len(lora_steps) == 2
