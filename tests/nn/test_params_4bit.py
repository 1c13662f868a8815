"""Params4bit: quantizes once, travels with its settings, and is rebuilt from its own ``__dict__``."""

from typing import Any

import pytest
import torch

import halfbyte.functional as F
from halfbyte.errors import ArgumentError
from halfbyte.nn import Linear4bit, Params4bit
from tests.support.hard_inputs import weights

SETTINGS = {"blocksize", "compress_statistics", "quant_type", "quant_state", "quant_storage", "bnb_quantized", "module"}


def plain(rows: int = 32, columns: int = 64, **named: Any) -> Params4bit:
    named.setdefault("quant_type", "nf4")
    return Params4bit(weights(rows * columns).view(rows, columns), **named)


def quantized(**named: Any) -> Params4bit:
    return plain(**named).to("cpu")


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(
        left.detach().reshape(-1).view(torch.uint8), right.detach().reshape(-1).view(torch.uint8)
    )


def test_the_first_move_to_a_device_quantizes_in_place_and_returns_itself() -> None:
    weight = plain()
    values = weight.data.clone()
    assert weight.to("cpu") is weight
    packed, state = F.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    assert torch.equal(weight.data, packed)
    assert weight.quant_state == state
    assert weight.bnb_quantized


@pytest.mark.parametrize("move", ["cpu", "to"])
def test_a_second_move_keeps_codes_and_state(move: str) -> None:
    weight = quantized()
    moved = weight.cpu() if move == "cpu" else weight.to(torch.device("cpu"), non_blocking=True)
    assert type(moved) is Params4bit
    assert same_bytes(moved, weight)
    assert moved.quant_state == weight.quant_state
    assert moved.bnb_quantized


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_dtype_alone_does_not_quantize(dtype: torch.dtype) -> None:
    weight = plain().to(dtype)
    assert type(weight) is Params4bit
    assert weight.dtype == dtype
    assert not weight.bnb_quantized
    assert weight.quant_type == "nf4"


def test_meta_does_not_quantize() -> None:
    weight = plain().to("meta")
    assert type(weight) is Params4bit
    assert weight.device.type == "meta"
    assert weight.shape == (32, 64)
    assert not weight.bnb_quantized


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["half", "bfloat16", "float", "double"])
def test_packed_codes_never_change_their_dtype(method: str, storage: torch.dtype) -> None:
    weight = quantized(quant_storage=storage)
    assert getattr(weight, method)() is weight
    assert weight.to(torch.float16).dtype == storage
    assert weight.to("cpu", torch.float16).dtype == storage


def test_moving_codes_to_meta_leaves_the_state_where_it_was() -> None:
    weight = quantized()
    ghost = weight.to("meta")
    assert ghost.device.type == "meta"
    assert weight.quant_state is not None
    assert {tensor.device.type for tensor in weight.quant_state.tensors()} == {"cpu"}
    assert weight.device.type == "cpu"


def test_its_dict_is_its_settings() -> None:
    assert set(vars(plain())) == SETTINGS
    assert set(vars(quantized())) == SETTINGS


def test_a_parameter_is_rebuilt_from_the_dict_of_another() -> None:
    old = plain(blocksize=128, compress_statistics=False, quant_storage=torch.bfloat16)
    new = Params4bit(weights(640).view(10, 64), **old.__dict__).to("cpu")
    assert new.blocksize == 128
    assert new.dtype == torch.bfloat16
    assert new.quant_state is not None
    assert not new.quant_state.nested


def test_codes_are_rebuilt_from_the_dict_of_their_parameter() -> None:
    old = quantized()
    new = Params4bit(old.data, requires_grad=False, **old.__dict__)
    assert same_bytes(new.to("cpu"), old)
    assert new.quant_state is old.quant_state


def test_new_values_under_old_settings_are_quantized_again() -> None:
    # peft merges so; some of its tuners forget to reset bnb_quantized.
    old = quantized()
    values = weights(32 * 64, seed=9).view(32, 64)
    expected, _ = F.quantize_4bit(values, quant_type="nf4")
    for flag in (True, False):
        new = Params4bit(values.clone(), **{**old.__dict__, "bnb_quantized": flag}).to("cpu")
        assert torch.equal(new.data, expected)
        assert new.quant_state != old.quant_state


def test_unknown_keywords_become_attributes_and_travel_on() -> None:
    weight = plain(_is_hf_initialized=True, colour="blue").to("cpu")
    assert weight._is_hf_initialized
    again = Params4bit(weight.data, **weight.__dict__)
    assert again.colour == "blue"


@pytest.mark.parametrize("prefix", ["", "weight.", "model.layers.0.mlp.up_proj.weight."])
@pytest.mark.parametrize("nested", [False, True])
def test_from_prequantized_takes_bare_and_dotted_keys_and_leaves_them_alone(nested: bool, prefix: str) -> None:
    old = quantized(compress_statistics=nested)
    assert old.quant_state is not None
    stats = {prefix + key: value for key, value in old.quant_state.as_dict(packed=True).items()}
    before = dict(stats)
    layer = Linear4bit(64, 32, bias=False, device="meta")
    new = Params4bit.from_prequantized(data=old.data, quantized_stats=stats, device="cpu", module=layer, mark=1)
    assert stats == before
    assert list(stats) == list(before)
    assert same_bytes(new, old)
    assert new.quant_state == old.quant_state
    assert layer.quant_state is new.quant_state
    assert (new.blocksize, new.quant_type, new.compress_statistics) == (64, "nf4", nested)
    assert new.quant_storage == torch.uint8
    assert new.bnb_quantized
    assert not new.requires_grad
    assert new.mark == 1


def test_from_prequantized_refuses_codes_of_another_length() -> None:
    old = quantized()
    assert old.quant_state is not None
    with pytest.raises(ArgumentError, match="holds 1000 bytes; expected 1024"):
        Params4bit.from_prequantized(old.data[:1000], old.quant_state.as_dict(packed=True), device="cpu")


@pytest.mark.parametrize("split", [torch.chunk, torch.Tensor.chunk])
def test_chunks_are_parameters_of_the_same_kind(split: Any) -> None:
    weight = quantized()
    pieces = split(weight, 4)
    assert len(pieces) == 4
    for piece in pieces:
        assert type(piece) is Params4bit
        assert piece.quant_state is weight.quant_state
        assert piece.bnb_quantized
    assert same_bytes(torch.cat(pieces), weight)


@pytest.mark.parametrize("split", [torch.split, torch.Tensor.split])
def test_splits_are_parameters_of_the_same_kind(split: Any) -> None:
    weight = quantized()
    pieces = split(weight, 300)
    assert [piece.shape[0] for piece in pieces] == [300, 300, 300, 124]
    assert all(type(piece) is Params4bit for piece in pieces)
    assert pieces[0].quant_state is weight.quant_state


def test_other_operations_give_plain_tensors() -> None:
    weight = quantized()
    for result in (weight[:4], weight + 0, weight.detach(), weight.clone(), weight.view(torch.int8), weight.data):
        assert type(result) is torch.Tensor


def test_sharding_finds_every_tensor_of_the_state_as_an_attribute() -> None:
    weight = quantized()
    state = weight.quant_state
    assert state is not None
    assert state.state2 is not None
    assert weight.absmax is state.absmax
    assert weight.code is weight.quant_map is state.code
    assert weight.offset is weight.nested_offset is state.offset
    assert weight.state2 is state.state2
    assert weight.nested_absmax is state.state2.absmax
    assert weight.nested_quant_map is state.state2.code
    assert weight.nested_blocksize == 256
    assert weight.nested_dtype == torch.float32
    assert torch.equal(state.bitsandbytes__nf4, state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"])


@pytest.mark.parametrize("name", ["absmax", "code", "quant_map", "offset", "state2", "nested_absmax"])
def test_before_quantization_there_is_no_such_attribute(name: str) -> None:
    assert not hasattr(plain(), name)


def test_without_double_quantization_there_is_no_second_level() -> None:
    weight = quantized(compress_statistics=False)
    assert not hasattr(weight, "nested_absmax")
    assert not hasattr(weight.quant_state, "bitsandbytes__fp4")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_and_stays_as_it_was(bad: float, nested: bool) -> None:
    weight = plain(compress_statistics=nested)
    weight.data[3, 5] = bad
    before = weight.data.clone()
    with pytest.raises(ArgumentError, match=r"weight of shape \(32, 64\) holds 1 NaN or inf values; expected finite"):
        weight.to("cpu")
    assert not weight.bnb_quantized
    assert weight.quant_state is None
    assert torch.equal(weight.data, before) or before.isnan().any()
    assert weight.dtype == torch.float32


def test_values_whose_mean_scale_overflows_are_refused_with_double_quantization_only() -> None:
    huge = torch.full((64, 64), 3.3e38)
    with pytest.raises(ArgumentError, match=r"overflows float32[^\n]*\nhint: use compress_statistics=False"):
        Params4bit(huge).to("cpu")
    weight = Params4bit(huge, compress_statistics=False).to("cpu")
    assert torch.equal(F.dequantize_4bit(weight.data, weight.quant_state), huge)


def test_a_weight_that_wants_gradients_is_refused_with_the_way_out() -> None:
    weight = Params4bit(torch.randn(8, 64), requires_grad=True)
    with pytest.raises(ArgumentError, match=r"requires_grad=False"):
        weight.to("cpu")
    assert not weight.bnb_quantized


def test_an_integer_weight_is_refused() -> None:
    weight = Params4bit(torch.zeros(8, 64, dtype=torch.int32))
    with pytest.raises(ArgumentError, match="int32"):
        weight.to("cpu")
    assert weight.dtype == torch.int32


def test_a_storage_that_the_bytes_do_not_fill_is_refused_and_nothing_changes() -> None:
    weight = Params4bit(torch.randn(3, 3), quant_storage=torch.float32)
    with pytest.raises(ArgumentError, match="9 values take 5 bytes"):
        weight.to("cpu")
    assert weight.shape == (3, 3)


@pytest.mark.parametrize("layout", ["transposed", "strided", "empty"])
def test_any_layout_quantizes_in_row_major_order(layout: str) -> None:
    base = weights(64 * 64).view(64, 64)
    data = {"transposed": base.t(), "strided": base[:, ::2], "empty": base[:0]}[layout]
    weight = Params4bit(data, quant_type="nf4", compress_statistics=False).to("cpu")
    expected, state = F.quantize_4bit(data.contiguous(), quant_type="nf4")
    assert torch.equal(weight.data, expected)
    assert weight.quant_state == state


def test_an_empty_parameter_can_be_made() -> None:
    assert Params4bit().numel() == 0


def test_a_move_to_where_it_is_returns_itself_so_that_it_keeps_its_layer() -> None:
    layer = Linear4bit(64, 32).to("cpu")
    assert layer.weight.to("cpu") is layer.weight
    assert layer.weight.to(torch.device("cpu")) is layer.weight
