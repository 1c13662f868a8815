"""nn.parametrize: 4-bit parameters of any module, in bitsandbytes' state dict format."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize as torch_parametrize

from halfbyte.functional import dequantize_4bit, quantize_4bit
from halfbyte.nn import parametrize, receipt


class Bag(torch.nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stack = torch.nn.Parameter(torch.randn(3, 8, 32))
        self.flat = torch.nn.Parameter(torch.randn(70).bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.stack.transpose(1, 2)).sum() + (x @ self.stack.transpose(1, 2)).mean()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("quant_type", "blocksize"), [("nf4", None), ("fp4", 32)])
@pytest.mark.parametrize("name", ["stack", "flat"])
def test_a_replaced_parameter_reads_as_its_dequantized_values(
    name: str, quant_type: Any, blocksize: int | None, nested: bool
) -> None:
    bag = Bag()
    original = getattr(bag, name).detach().clone()
    packed, state = quantize_4bit(original, None, None, blocksize, nested, quant_type)
    parametrize.replace_parameter_4bit(bag, name, nested, quant_type, blocksize)
    value = getattr(bag, name)
    assert value.dtype == original.dtype
    assert not value.requires_grad
    assert torch.equal(value, dequantize_4bit(packed, state))
    assert torch.equal(bag.parametrizations[name].original, packed)


def test_the_state_dict_has_the_names_of_a_4bit_weight_and_loads_again() -> None:
    bag, other = Bag(), Bag(1)
    for each in (bag, other):
        parametrize.replace_parameter_4bit(each, "stack", compress_statistics=True)
    state = bag.state_dict()
    assert set(state) == {"flat", "stack"} | {
        f"stack.{key}"
        for key in ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    }
    other.load_state_dict(copy.deepcopy(state))
    assert torch.equal(other.stack, bag.stack)
    broken = {**state, "stack.absmax": state["stack.absmax"][:-1]}
    before = other.stack.clone()
    with pytest.raises(RuntimeError, match="stack: absmax"):
        other.load_state_dict(broken)
    assert torch.equal(other.stack, before)


def test_another_modules_error_leaves_no_codes_without_their_state() -> None:
    both, other = (torch.nn.ModuleList([torch.nn.Linear(4, 4), Bag(seed)]) for seed in (0, 1))
    for each in (both, other):
        parametrize.replace_parameter_4bit(each[1], "stack")
    state = {**both.state_dict(), "0.weight": torch.zeros(5, 5)}
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        other.load_state_dict(state)
    assert torch.equal(other[1].stack, both[1].stack)


def test_packed_codes_become_readable_with_their_serialized_state() -> None:
    bag = Bag()
    packed, state = quantize_4bit(bag.stack.detach(), quant_type="nf4")
    bag.stack = torch.nn.Parameter(packed, requires_grad=False)
    stats = {f"layers.0.stack.{key}": value for key, value in state.as_dict(packed=True).items()}
    parametrize.replace_parameter_4bit_prequantized(bag, "stack", stats, torch.device("cpu"))
    assert torch.equal(bag.stack, dequantize_4bit(packed, state))
    assert torch.equal(bag.state_dict()["stack.absmax"], state.absmax)


def test_within_one_pass_it_is_dequantized_once_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    bag = Bag()
    parametrize.replace_parameter_4bit(bag, "stack")
    calls: list[int] = []
    monkeypatch.setattr(parametrize, "dequantize_4bit", lambda *args: calls.append(1) or dequantize_4bit(*args))
    bag(torch.randn(2, 32))
    assert len(calls) == 1
    assert torch_parametrize._cache == {}
    assert torch_parametrize._cache_enabled == 0


def test_a_pass_that_fails_keeps_nothing_either() -> None:
    bag = Bag()
    parametrize.replace_parameter_4bit(bag, "stack")
    with pytest.raises(RuntimeError):
        bag(torch.randn(2, 31))
    assert torch_parametrize._cache == {}
    assert torch_parametrize._cache_enabled == 0


def test_gradients_pass_through_to_the_input() -> None:
    bag, x = Bag(), torch.randn(2, 32, requires_grad=True)
    parametrize.replace_parameter_4bit(bag, "stack")
    bag(x).backward()
    assert x.grad is not None
    assert bool(x.grad.any())


def test_the_receipt_counts_it() -> None:
    bag = Bag()
    parametrize.replace_parameter_4bit(bag, "stack")
    assert receipt(bag, show=False).formats == {"nf4": 3 * 8 * 32}


def test_names_that_are_no_parameters_are_the_built_in_errors() -> None:
    bag = Bag()
    with pytest.raises(AttributeError, match="Bag has no parameter 'colour'"):
        parametrize.replace_parameter_4bit(bag, "colour")
    with pytest.raises(TypeError, match=r"'training' of Bag is a bool"):
        parametrize.replace_parameter_4bit_prequantized(bag, "training", {}, torch.device("cpu"))
