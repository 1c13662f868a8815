"""State dicts of 8-bit layers: bitsandbytes' keys, strict loading into any layer, old layouts, and damaged ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte.functional as F
from halfbyte.nn import Linear8bitLt
from halfbyte.nn.weight_formats import maybe_rearrange_weight
from tests.support.hard_inputs import weights
from tests.support.int8_inputs import THRESHOLD, activations
from tests.support.old_layouts import OFFSETS, stored_as

N, K = 37, 70
"""Whole tiles of no layout, so that all of them are padded."""


def layer_of(seed: int = 0, move: bool = True, **named: Any) -> Linear8bitLt:
    layer = Linear8bitLt(K, N, **{"has_fp16_weights": False, "threshold": THRESHOLD, **named})
    if layer.weight.device.type != "meta":
        layer.weight.data = weights(N * K, seed=seed).view(N, K)
        layer.bias.data = weights(N, seed=seed + 100)
        layer = layer.to("cpu") if move else layer
    return layer


def snapshot(layer: torch.nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        key: (value.dtype, value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        for key, value in layer.state_dict().items()
    }


TARGETS: dict[str, Callable[[], Linear8bitLt]] = {
    "fresh": lambda: layer_of(seed=1, move=False),
    "quantized": lambda: layer_of(seed=1),
    "meta": lambda: layer_of(device="meta"),
}


def test_keys_dtypes_and_shapes_are_those_of_bitsandbytes() -> None:
    found = layer_of().state_dict()
    assert list(found) == ["weight", "bias", "SCB", "weight_format"]
    assert (found["weight"].dtype, found["weight"].shape) == (torch.int8, (N, K))
    assert (found["SCB"].dtype, found["SCB"].shape) == (torch.float32, (N,))
    assert (found["weight_format"].dtype, found["weight_format"].shape, int(found["weight_format"])) == (
        torch.uint8,
        (),
        0,
    )
    assert not any(isinstance(value, torch.nn.Parameter) for value in found.values())


@pytest.mark.parametrize("named", [{"move": False}, {"has_fp16_weights": True}, {"device": "meta"}])
def test_an_unquantized_layer_saves_a_plain_weight(named: dict[str, Any]) -> None:
    assert list(layer_of(**named).state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_a_quantized_state_dict_loads_strictly_into_any_layer(target: str, assign: bool, forward_first: bool) -> None:
    if target == "meta" and not assign:
        pytest.skip("torch copies nothing into a meta bias")
    source, layer = layer_of(), TARGETS[target]()
    if forward_first:
        source(activations(2, K))
        if target == "quantized":
            layer(activations(2, K))
    result = layer.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert snapshot(layer) == snapshot(source)
    assert torch.equal(layer(activations(2, K)), source(activations(2, K)))


def test_a_file_round_trip_is_exact(tmp_path: Path) -> None:
    source, layer = layer_of(), layer_of(seed=1)
    save_file(source.state_dict(), tmp_path / "layer.safetensors")
    layer.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert snapshot(layer) == snapshot(source)


def test_loading_keeps_the_parameter_and_copies_the_dictionary() -> None:
    layer, given = layer_of(seed=1), layer_of().state_dict()
    parameter = layer.weight
    layer.load_state_dict(given)
    assert layer.weight is parameter
    before = snapshot(layer)
    given["SCB"].zero_()
    given["weight"].zero_()
    assert snapshot(layer) == before


def test_layers_within_a_model_load_by_their_prefix() -> None:
    source = torch.nn.Sequential(layer_of(), torch.nn.Sequential(layer_of(seed=2)))
    target = torch.nn.Sequential(layer_of(seed=4), torch.nn.Sequential(layer_of(seed=5, move=False)))
    target.load_state_dict(source.state_dict())
    assert snapshot(source) == snapshot(target)


def test_a_plain_state_dict_is_quantized_by_a_quantized_layer_and_copied_by_others() -> None:
    given = layer_of(seed=3, move=False).state_dict()
    quantized, fresh, trained = layer_of(), layer_of(move=False), layer_of(has_fp16_weights=True)
    for layer in (quantized, fresh, trained):
        layer.load_state_dict(given)
    assert snapshot(quantized) == snapshot(layer_of(seed=3))
    assert torch.equal(fresh.weight, given["weight"])
    assert torch.equal(trained.weight, given["weight"])


def test_a_layer_that_keeps_floats_takes_the_dequantized_values() -> None:
    source, layer = layer_of(), layer_of(has_fp16_weights=True, seed=1)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer.weight, F.int8_vectorwise_dequant(source.weight.CB, source.weight.SCB))
    assert layer.weight.requires_grad


NUMBERS = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}


@pytest.mark.parametrize("number", [torch.tensor, int, str])
@pytest.mark.parametrize("name", OFFSETS)
def test_old_layouts_are_read_and_saved_as_rows(name: str, number: Callable[[Any], Any]) -> None:
    source, layer = layer_of(), layer_of(seed=1, move=False)
    given = source.state_dict()
    given["weight"] = stored_as(given["weight"], name)
    given["weight_format"] = name if number is str else number(NUMBERS[name])
    layer.load_state_dict(given)
    assert snapshot(layer) == snapshot(source)


@pytest.mark.parametrize("name", ["row", *OFFSETS])
def test_the_hook_that_old_layers_name_puts_a_weight_into_rows(name: str) -> None:
    source, layer = layer_of(), layer_of(seed=1)
    given = dict(source.state_dict())
    padded = torch.nn.functional.pad(given["weight"], (0, 0 if name == "row" else 26))
    given["weight"] = padded if name == "row" else stored_as(padded, name)
    given["weight_format"] = torch.tensor(NUMBERS[name])
    maybe_rearrange_weight(given, "", {}, True, [], [], [])
    assert "weight_format" not in given
    assert torch.equal(given["weight"], padded)
    given["weight"] = given["weight"][:, :K]
    layer.load_state_dict(given)
    assert snapshot(layer) == snapshot(source)


def test_a_state_dict_without_weight_format_is_in_rows() -> None:
    source, layer = layer_of(), layer_of(seed=1)
    given = source.state_dict()
    del given["weight_format"]
    layer.load_state_dict(given)
    assert snapshot(layer) == snapshot(source)


def damaged(**changes: Any) -> dict[str, Any]:
    given = dict(layer_of().state_dict())
    for key, value in changes.items():
        if value is None:
            del given[key]
        else:
            given[key] = value
    return given


DAMAGED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "scales are missing": (lambda: damaged(SCB=None), "int8 codes without their SCB"),
    "the weight is missing": (lambda: damaged(weight=None), "SCB without weight"),
    "too few scales": (lambda: damaged(SCB=torch.ones(N - 1)), "SCB has 36 values; expected 37"),
    "another shape": (
        lambda: damaged(weight=torch.zeros(N, K + 1, dtype=torch.int8)),
        r"shape \(37, 71\); expected \(37, 70\)",
    ),
    "an unknown layout": (lambda: damaged(weight_format=torch.tensor(9)), r"weight_format is 9; expected 0 \(row\)"),
    "too few codes for the layout": (lambda: damaged(weight_format=torch.tensor(3)), "a col_ampere weight of 2590"),
    "scales beside floats": (lambda: damaged(weight=torch.zeros(N, K)), "SCB beside a weight of torch.float32"),
    "NaN values": (
        lambda: {"weight": torch.full((N, K), float("nan")), "bias": torch.zeros(N)},
        "holds 2590 NaN or inf values",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_state_dict_is_an_error_and_changes_nothing(name: str) -> None:
    make, message = DAMAGED[name]
    layer = layer_of(seed=1)
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(make())
    assert snapshot(layer) == before


def test_missing_and_foreign_keys_are_reported_as_for_any_layer() -> None:
    result = layer_of().load_state_dict({"other": torch.zeros(1)}, strict=False)
    assert result.missing_keys == ["weight", "bias"]
    assert result.unexpected_keys == ["other"]
