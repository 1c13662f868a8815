"""QuantState: attributes, list form, equality, moves, and its two serialized forms."""

import json
from typing import Any

import pytest
import torch

import halfbyte.functional as F
from halfbyte.errors import CheckpointError
from halfbyte.quant_state import QuantState, pack_dict_to_tensor, unpack_tensor_to_dict
from tests.support.hard_inputs import DTYPES, weights


def state_of(nested: bool = True, kind: str = "nf4", dtype: torch.dtype = torch.float32, seed: int = 0) -> QuantState:
    A = weights(32 * 64, dtype, seed).view(32, 64)
    return F.quantize_4bit(A, compress_statistics=nested, quant_type=kind)[1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_both_serialized_forms_read_back(kind: str, nested: bool, dtype: torch.dtype, packed: bool) -> None:
    state = state_of(nested, kind, dtype)
    again = QuantState.from_dict(state.as_dict(packed=packed), "cpu")
    assert again == state
    assert (again.shape, again.dtype, again.blocksize) == (torch.Size([32, 64]), dtype, 64)
    assert (again.quant_type, again.nested) == (kind, nested)
    if nested:
        assert again.offset is not None
        assert torch.equal(again.offset, state.offset)
        assert (again.offset.dtype, again.offset.dim()) == (torch.float32, 0)


def test_reading_leaves_the_dictionary_alone() -> None:
    given = {f"layer.weight.{key}": value for key, value in state_of().as_dict(packed=True).items()}
    before = dict(given)
    QuantState.from_dict(given, "cpu")
    assert list(given) == list(before)
    assert all(given[key] is before[key] for key in before)


def test_a_mean_that_a_loader_cast_to_bf16_is_computed_with_in_fp32() -> None:
    state = state_of()
    loose = {**state.as_dict(), "nested_offset": torch.tensor(1.5, dtype=torch.bfloat16)}
    again = QuantState.from_dict(loose, "cpu")
    assert again.offset is not None
    assert again.offset.dtype == torch.float32


def test_scales_that_a_loader_cast_are_fp32_again() -> None:
    loose = {**state_of(nested=False).as_dict(), "quant_map": F.get_4bit_type("nf4", "cpu").bfloat16()}
    loose["absmax"] = loose["absmax"].bfloat16()
    again = QuantState.from_dict(loose, "cpu")
    assert again.absmax.dtype == torch.float32
    assert again.code is not None
    assert again.code.dtype == torch.float32


def test_the_list_form_of_old_code() -> None:
    state = state_of()
    assert state[0] is state.absmax
    assert state[1] == state.shape
    assert state[2] == torch.float32
    assert state[3] == 64
    assert state[4] == [state.offset, state.state2]
    assert state[5] == "nf4"
    assert state[-1] == "nf4"
    assert state[2:4] == [torch.float32, 64]
    assert len(list(state)) == 6
    assert state_of(nested=False)[4] is None
    with pytest.raises(IndexError):
        state[6]


def test_equality_is_by_value() -> None:
    assert state_of() == state_of()
    for other in (state_of(False), state_of(True, "fp4"), state_of(seed=1), state_of(dtype=torch.float16), "state"):
        assert state_of() != other


def test_attributes_may_be_assigned_as_vllm_does() -> None:
    packed, state = F.quantize_4bit(weights(2048).view(32, 64), quant_type="nf4", compress_statistics=True)
    expected = F.dequantize_4bit(packed, state)
    assert state.state2 is not None
    absmax = F.dequantize_blockwise(state.absmax, state.state2)
    absmax += state.offset
    state.absmax, state.nested, state.offset, state.state2 = absmax, False, None, None
    assert torch.equal(F.dequantize_4bit(packed, state), expected)


def test_moving_is_in_place_and_returns_itself() -> None:
    state = state_of()
    assert state.to("meta") is state
    assert {tensor.device.type for tensor in state.tensors()} == {"meta"}


def test_a_copy_elsewhere_leaves_the_original_where_it_is() -> None:
    state = state_of()
    twin = state.copy_to("meta")
    assert {tensor.device.type for tensor in twin.tensors()} == {"meta"}
    assert {tensor.device.type for tensor in state.tensors()} == {"cpu"}
    assert (twin.shape, twin.nested, twin.quant_type) == (state.shape, True, "nf4")


def test_it_shows_what_it_is_not_its_numbers() -> None:
    assert repr(state_of()) == (
        "QuantState(quant_type='nf4', shape=(32, 64), dtype=torch.float32, blocksize=64, nested=True, device=cpu)"
    )


def test_no_tensor_is_shared_between_states() -> None:
    first, second = state_of(), state_of()
    assert {t.data_ptr() for t in first.tensors()}.isdisjoint({t.data_ptr() for t in second.tensors()})


def test_no_tensor_is_shared_between_serialized_states() -> None:
    # safetensors refuses tensors that share memory.
    states = [state_of().as_dict(packed=True) for _ in range(2)]
    pointers = [tensor.data_ptr() for found in states for tensor in found.values()]
    assert len(pointers) == len(set(pointers))


def test_states_that_share_a_code_map_serialize_apart() -> None:
    first, second = state_of(), state_of(seed=1)
    assert first.state2 is not None
    assert second.state2 is not None
    second.state2.code = first.state2.code
    maps = [state.as_dict(packed=True)["nested_quant_map"] for state in (first, second)]
    assert maps[0].data_ptr() != maps[1].data_ptr()


@pytest.mark.parametrize("source", [{}, {"a": 1, "b": [1, 2], "c": None, "d": "ü"}, {"x": 0.1}])
def test_packed_dictionaries_read_back(source: dict[str, Any]) -> None:
    tensor = pack_dict_to_tensor(source)
    assert (tensor.dtype, tensor.dim()) == (torch.uint8, 1)
    assert bytes(tensor.tolist()) == json.dumps(source).encode()
    assert unpack_tensor_to_dict(tensor) == source


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "neither a packed nor an unpacked quant_state among no keys"),
    "no type": ({"absmax": torch.ones(1)}, "neither a packed nor an unpacked quant_state among absmax"),
    "unknown type": ({**state_of().as_dict(), "quant_type": "nf5"}, "quant_type is 'nf5'; expected nf4 or fp4"),
    "no shape": ({**state_of(False).as_dict(), "absmax": None}, "lacks absmax"),
    "shape of words": ({**state_of().as_dict(), "shape": ["a"]}, r"shape is \['a'\]"),
    "negative shape": ({**state_of().as_dict(), "shape": [-1, 64]}, r"shape is \[-1, 64\]"),
    "boolean blocksize": ({**state_of().as_dict(), "blocksize": True}, "blocksize is True"),
    "dtype of numbers": ({**state_of().as_dict(), "dtype": 5}, "dtype is 5"),
    "dtype that is no dtype": ({**state_of().as_dict(), "dtype": "nn"}, "dtype is 'nn'"),
    "absmax of another shape": ({**state_of(False).as_dict(), "shape": (32, 128)}, "with 32 values; expected .* 64"),
    "absmax that is a number": ({**state_of(False).as_dict(), "absmax": 3.0}, "absmax is float; expected a tensor"),
    "foreign": ({**state_of().as_dict(), "colour": 1}, "foreign keys in the quant_state: colour"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_dictionary_is_one_readable_error(case: str) -> None:
    given, message = DAMAGED[case]
    with pytest.raises(CheckpointError, match=message):
        QuantState.from_dict(given, "cpu")


def test_an_attribute_that_there_is_not_is_an_attribute_error() -> None:
    state = state_of()
    assert not hasattr(state, "colour")
    assert not hasattr(state, "bitsandbytes__fp4")
    assert hasattr(state, "bitsandbytes__nf4")
