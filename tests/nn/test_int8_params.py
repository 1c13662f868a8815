"""Int8Params: quantizes once, keeps its scales through every move and copy, and is rebuilt from its own attributes."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import halfbyte.functional as F
from halfbyte.errors import ArgumentError
from halfbyte.nn import Int8Params
from tests.support.hard_inputs import DTYPES, weights


def plain(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return weights(24 * 64, dtype).view(24, 64)


def quantized() -> Int8Params:
    return Int8Params(plain(), requires_grad=False).to("cpu")


def same(left: Int8Params, right: Int8Params) -> bool:
    assert left.CB is not None
    assert left.SCB is not None
    return torch.equal(left.CB, right.CB) and torch.equal(left.SCB, right.SCB)


def through_torch_save(weight: Int8Params) -> Any:
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Int8Params], Int8Params]] = {
    "to": lambda w: w.to("cpu"),
    "to another dtype": lambda w: w.to(torch.bfloat16),
    "cpu": lambda w: w.cpu(),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "torch.save": through_torch_save,
    "its own attributes": lambda w: Int8Params(w.data, requires_grad=False, **vars(w)),
    "meta and back": lambda w: _brought_back(w.to("meta"), w.data),
}


def _brought_back(gone: Int8Params, codes: torch.Tensor) -> Int8Params:
    assert gone.device.type == "meta"
    return Int8Params(codes, requires_grad=False, **vars(gone)).to("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("move", [lambda w: w.to("cpu"), lambda w: w.cpu(), lambda w: w.to(device="cpu")])
def test_the_first_move_quantizes_in_place_from_the_weights_own_dtype(
    move: Callable[[Int8Params], Int8Params], dtype: torch.dtype
) -> None:
    weight = Int8Params(plain(dtype), requires_grad=False)
    assert (weight.CB, weight.SCB) == (None, None)
    assert move(weight) is weight
    codes, scales, _ = F.int8_vectorwise_quant(plain(dtype))
    assert torch.equal(weight.data, codes)
    assert torch.equal(weight.CB, codes)
    assert torch.equal(weight.SCB, scales)


@pytest.mark.parametrize("name", COPIES)
def test_codes_and_scales_survive(name: str) -> None:
    weight = quantized()
    other = COPIES[name](weight)
    assert type(other) is Int8Params
    assert other.dtype == torch.int8
    assert not other.requires_grad
    assert same(weight, other)


@pytest.mark.parametrize("name", ["deepcopy", "pickle", "torch.save"])
def test_copies_share_nothing(name: str) -> None:
    weight = quantized()
    other = COPIES[name](weight)
    before = weight.SCB.clone()
    other.SCB.mul_(2)
    other.data.zero_()
    assert torch.equal(weight.SCB, before)
    assert weight.data.any()


def test_extra_attributes_travel() -> None:
    weight = Int8Params(plain(), requires_grad=False, _is_hf_initialized=True, tag="a")
    assert weight.tag == "a"
    weight = weight.to("cpu")
    for name in COPIES:
        assert COPIES[name](weight)._is_hf_initialized is True, name


def test_meta_and_dtype_moves_do_not_quantize() -> None:
    for moved in (Int8Params(plain(), requires_grad=False).to("meta"), Int8Params(plain()).to(torch.bfloat16)):
        assert type(moved) is Int8Params
        assert moved.is_floating_point()
        assert moved.CB is None


def test_a_weight_that_stays_in_floats_is_never_quantized() -> None:
    weight = Int8Params(plain(), has_fp16_weights=True)
    assert weight.requires_grad
    moved = weight.to("cpu", torch.bfloat16)
    assert (moved.dtype, moved.CB, moved.has_fp16_weights) == (torch.bfloat16, None, True)


def test_quantizing_a_weight_that_requires_grad_turns_that_off() -> None:
    weight = Int8Params(plain()).to("cpu")
    assert weight.dtype == torch.int8
    assert not weight.requires_grad
    assert not Int8Params(torch.zeros(2, 2, dtype=torch.int8)).requires_grad


def test_codes_never_show_without_scales() -> None:
    bare = Int8Params(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    assert bare.CB is None
    bare.SCB = torch.ones(3)
    assert bare.CB is not None
    assert Int8Params(plain(), requires_grad=False, SCB=torch.ones(24)).SCB is None


def test_new_values_with_old_attributes_are_quantized_anew() -> None:
    old = quantized()
    fresh = Int8Params(plain() * 3, requires_grad=False, **vars(old)).to("cpu")
    assert torch.equal(fresh.SCB, F.int8_vectorwise_quant(plain() * 3)[1])
    assert not same(old, fresh)


def test_codes_can_be_given_as_cb_and_replaced() -> None:
    weight = quantized()
    assert same(Int8Params(requires_grad=False, CB=weight.CB, SCB=weight.SCB), weight)
    weight.CB = weight.CB.flip(0)
    assert torch.equal(weight.data, quantized().data.flip(0))
    weight.CB = None
    assert weight.CB is not None
    with pytest.raises(ArgumentError, match=r"CB is torch\.float32; expected int8"):
        weight.CB = plain()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_refused_and_stays_as_it_was(value: float) -> None:
    damaged = plain()
    damaged[3, 5] = value
    weight = Int8Params(damaged.clone(), requires_grad=False)
    with pytest.raises(ArgumentError, match=r"shape \(24, 64\) holds 1 NaN or inf values"):
        weight.to("cpu")
    assert weight.is_floating_point()
    assert torch.equal(weight.data.nan_to_num(), damaged.nan_to_num())


def test_scales_follow_codes_that_another_module_moved() -> None:
    from halfbyte.autograd import matmul

    weight = quantized()
    expected = matmul(torch.ones(1, 64), weight)
    holder = torch.nn.Module()
    holder.weight = weight
    holder.to("cpu")
    assert torch.equal(matmul(torch.ones(1, 64), holder.weight), expected)


@pytest.mark.parametrize("name", ["half", "bfloat16", "float", "double"])
def test_short_names_of_dtypes_never_touch_codes(name: str) -> None:
    weight = quantized()
    assert getattr(weight, name)() is weight
    assert getattr(Int8Params(plain(), requires_grad=False), name)().is_floating_point()
