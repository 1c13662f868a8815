"""Copies of a 4-bit layer and its parameter: deepcopy, copy, pickle, torch.save."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from halfbyte.nn import Linear4bit, LinearNF4, Params4bit
from tests.support.hard_inputs import weights


def layer_of(nested: bool = True, move: bool = True) -> Linear4bit:
    layer = Linear4bit(64, 32, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4")
    layer.weight.data = weights(32 * 64).view(32, 64)
    return layer.to("cpu") if move else layer


def through_torch_save(value: Any, weights_only: bool = False) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_a_copied_layer_computes_the_same(how: str, nested: bool) -> None:
    layer = layer_of(nested)
    twin = COPIES[how](layer)
    x = torch.randn(3, 64)
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_layer_owns_its_weight_and_state(how: str) -> None:
    layer = layer_of()
    twin = COPIES[how](layer)
    assert type(twin) is Linear4bit
    assert type(twin.weight) is Params4bit
    assert twin.weight.module is twin
    assert twin.quant_state is twin.weight.quant_state
    assert twin.weight.quant_state is not layer.weight.quant_state
    assert twin.weight.quant_state == layer.weight.quant_state
    for name, value in vars(layer.weight).items():
        if name not in {"module", "quant_state"}:
            assert vars(twin.weight)[name] == value


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_layer_shares_no_memory(how: str) -> None:
    layer = layer_of()
    twin = COPIES[how](layer)
    before = layer.weight.data.clone()
    twin.weight.data.zero_()
    for tensor in twin.weight.quant_state.tensors():
        tensor.zero_()
    assert torch.equal(layer.weight.data, before)
    assert all(tensor.any() for tensor in layer.weight.quant_state.tensors())


@pytest.mark.parametrize("how", COPIES)
def test_an_unquantized_layer_is_copied_unquantized(how: str) -> None:
    layer = layer_of(move=False)
    twin = COPIES[how](layer)
    assert twin.weight.quant_state is None
    assert not twin.weight.bnb_quantized
    twin.to("cpu")
    assert torch.equal(twin.weight.data, layer.to("cpu").weight.data)


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_parameter_keeps_class_and_settings(how: str) -> None:
    weight = Params4bit(weights(512).view(8, 64), blocksize=128, quant_type="nf4", mark="m").to("cpu")
    twin = COPIES[how](weight)
    assert type(twin) is Params4bit
    assert torch.equal(twin.data, weight.data)
    assert twin.quant_state == weight.quant_state
    assert (twin.blocksize, twin.bnb_quantized, twin.mark, twin.requires_grad) == (128, True, "m", False)


def test_a_shallow_copy_shares_data_and_state() -> None:
    weight = layer_of().weight
    twin = copy.copy(weight)
    assert type(twin) is Params4bit
    assert twin is not weight
    assert twin.data_ptr() == weight.data_ptr()
    assert twin.quant_state is weight.quant_state
    assert twin.module is weight.module


def test_a_copied_model_keeps_tied_layers_tied() -> None:
    model = torch.nn.Sequential(LinearNF4(64, 64), LinearNF4(64, 64))
    model[1].weight = model[0].weight
    model = model.to("cpu")
    assert model[0].weight is model[1].weight
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight
    assert twin[0].weight is not model[0].weight


def test_state_dicts_load_with_weights_only() -> None:
    layer = layer_of()
    saved = through_torch_save(layer.state_dict(), weights_only=True)
    twin = Linear4bit(64, 32, compute_dtype=torch.float32)
    twin.load_state_dict(saved)
    x = torch.randn(3, 64)
    assert torch.equal(twin(x), layer(x))


def test_getstate_and_setstate_carry_everything() -> None:
    weight = layer_of().weight
    state = weight.__getstate__()
    assert {"data", "requires_grad", "quant_state", "blocksize"} <= set(state)
    twin = Params4bit()
    twin.__setstate__(state)
    assert torch.equal(twin.data, weight.data)
    assert twin.quant_state is weight.quant_state
    assert "data" in state
