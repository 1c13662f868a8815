"""State dicts of 4-bit layers: strict loading into any layer, and damaged ones that change nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from halfbyte.nn import Linear4bit, LinearNF4, Params4bit
from tests.support.hard_inputs import weights

STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
NESTED_KEYS = [
    "weight",
    "bias",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
]


def layer_of(seed: int = 0, move: bool = True, nested: bool = True, **named: Any) -> Linear4bit:
    named = {"compute_dtype": torch.float32, "quant_type": "nf4", **named}
    layer = Linear4bit(64, 32, compress_statistics=nested, **named)
    if layer.weight.device.type != "meta":
        layer.weight.data = weights(32 * 64, seed=seed).view(32, 64)
        layer.bias.data = weights(32, seed=seed + 100)
        layer = layer.to("cpu") if move else layer
    return layer


def snapshot(layer: torch.nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        key: (value.dtype, value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        for key, value in layer.state_dict().items()
    }


TARGETS: dict[str, Callable[[], Linear4bit]] = {
    "fresh": lambda: layer_of(seed=1, move=False),
    "quantized": lambda: layer_of(seed=1),
    "quantized otherwise": lambda: layer_of(seed=1, nested=False, quant_type="fp4", quant_storage=torch.float16),
    "meta": lambda: layer_of(device="meta"),
}
# torch copies nothing into a meta bias without assign; without a bias there is a test of its own.
LOADS = [(target, assign) for target in TARGETS for assign in (False, True) if assign or target != "meta"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("target", "assign"), LOADS)
def test_a_quantized_state_dict_loads_strictly_into_any_layer(
    target: str, assign: bool, storage: torch.dtype, nested: bool
) -> None:
    source, layer = layer_of(nested=nested, quant_storage=storage), TARGETS[target]()
    result = layer.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert snapshot(layer) == snapshot(source)
    assert type(layer.weight) is Params4bit
    assert layer.weight.module is layer
    assert layer.quant_state is layer.weight.quant_state
    assert layer.weight.quant_state == source.weight.quant_state
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), source(x))


def test_a_meta_layer_without_bias_needs_no_assign() -> None:
    source = LinearNF4(64, 32, bias=False, compute_dtype=torch.float32).to("cpu")
    layer = LinearNF4(64, 32, bias=False, compute_dtype=torch.float32, device="meta")
    layer.load_state_dict(source.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), source(x))


def test_the_keys_are_those_of_bitsandbytes_in_their_order() -> None:
    assert list(layer_of().state_dict()) == NESTED_KEYS
    assert list(layer_of(move=False).state_dict()) == ["weight", "bias"]
    assert list(layer_of().state_dict(prefix="a.b.")) == [f"a.b.{key}" for key in NESTED_KEYS]


def test_loading_leaves_the_callers_dictionary_alone() -> None:
    saved = layer_of().state_dict()
    before = {key: value.clone() for key, value in saved.items()}
    layer_of(seed=1).load_state_dict(saved)
    assert list(saved) == list(before)
    assert all(torch.equal(saved[key], before[key]) for key in before)


def test_a_loaded_layer_does_not_change_with_the_dictionary() -> None:
    saved = {key: value.clone() for key, value in layer_of().state_dict().items()}
    layer = layer_of(seed=1)
    layer.load_state_dict(saved)
    before = snapshot(layer)
    for value in saved.values():
        value.zero_()
    assert snapshot(layer) == before


def test_two_layers_loaded_from_one_dictionary_share_no_tensor() -> None:
    saved = layer_of().state_dict()
    first, second = layer_of(seed=1), layer_of(seed=2)
    first.load_state_dict(saved)
    second.load_state_dict(saved)
    own = {tensor.data_ptr() for tensor in [first.weight, *first.weight.quant_state.tensors()]}
    assert own.isdisjoint({tensor.data_ptr() for tensor in [second.weight, *second.weight.quant_state.tensors()]})


def test_loaded_settings_are_those_of_the_codes() -> None:
    source = Linear4bit(64, 32, compress_statistics=False, quant_type="fp4", quant_storage=torch.bfloat16).to("cpu")
    layer = layer_of()
    layer.load_state_dict(source.state_dict())
    weight = layer.weight
    assert (weight.quant_type, weight.compress_statistics, weight.quant_storage) == ("fp4", False, torch.bfloat16)
    again = layer_of(seed=3)
    again.load_state_dict(layer.state_dict())
    assert snapshot(again) == snapshot(source)


def test_a_plain_state_dict_loads_into_a_fresh_layer_and_is_quantized_by_the_move() -> None:
    dense = torch.nn.Linear(64, 32)
    layer = layer_of(move=False)
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.weight.data, dense.weight.data)
    expected = Params4bit(dense.weight.data.clone(), quant_type="nf4").to("cpu")
    assert torch.equal(layer.to("cpu").weight.data, expected.data)


def test_a_plain_state_dict_loads_into_a_quantized_layer_and_is_quantized() -> None:
    dense = torch.nn.Linear(64, 32)
    layer = layer_of(quant_storage=torch.bfloat16)
    layer.load_state_dict(dense.state_dict())
    expected = Params4bit(dense.weight.data.clone(), quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    assert torch.equal(layer.weight.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert layer.quant_state is layer.weight.quant_state
    assert torch.equal(dense.weight.data, dense.state_dict()["weight"])


def test_a_model_loads_all_its_layers() -> None:
    def model() -> torch.nn.Module:
        return torch.nn.Sequential(LinearNF4(64, 64), torch.nn.LayerNorm(64), LinearNF4(64, 8))

    source, target = model().to("cpu"), model()
    target.load_state_dict(source.state_dict())
    assert snapshot(target) == snapshot(source)


Damage = Callable[[dict[str, torch.Tensor]], None]


def _cut(key: str) -> Damage:
    return lambda saved: saved.update({key: saved[key].reshape(-1)[:-1]})


def _drop(key: str) -> Damage:
    def drop(saved: dict[str, torch.Tensor]) -> None:
        del saved[key]

    return drop


def _blob(text: bytes) -> Damage:
    return lambda saved: saved.update({NESTED_KEYS[-1]: torch.tensor(list(text), dtype=torch.uint8)})


DAMAGES: dict[str, tuple[Damage, str]] = {
    "absmax missing": (_drop("weight.absmax"), "lacks absmax"),
    "code map missing": (_drop("weight.quant_map"), "lacks quant_map"),
    "second level missing": (_drop("weight.nested_absmax"), "absmax is torch.uint8 and there is no nested_absmax"),
    "second map missing": (_drop("weight.nested_quant_map"), "nested_quant_map is NoneType; expected a tensor"),
    "state missing": (_drop(NESTED_KEYS[-1]), "neither a packed nor an unpacked quant_state"),
    "weight missing": (_drop("weight"), "without weight; expected both"),
    "codes cut short": (_cut("weight"), "holds 1023 bytes; expected 1024"),
    "absmax cut short": (_cut("weight.absmax"), "absmax is torch.uint8 with 31 values; expected torch.uint8 with 32"),
    "second level cut short": (_cut("weight.nested_absmax"), "nested_absmax is torch.float32 with 0 values"),
    "code map cut short": (_cut("weight.quant_map"), "quant_map has 15 values; expected 16"),
    "absmax cast": (
        lambda saved: saved.update({"weight.absmax": saved["weight.absmax"].float()}),
        "absmax is torch.float32",
    ),
    "JSON cut short": (_cut(NESTED_KEYS[-1]), "no valid JSON"),
    "JSON of something else": (_blob(b"[1, 2]"), "holds a JSON list; expected a JSON object"),
    "JSON without blocksize": (
        _blob(b'{"quant_type": "nf4", "dtype": "float32", "shape": [32, 64]}'),
        "lacks blocksize",
    ),
    "JSON no text": (_blob(b"\xff\xfe\x00"), "no valid JSON"),
    "another type under this key": (
        _blob(b'{"quant_type": "fp4", "blocksize": 64, "dtype": "float32", "shape": [32, 64]}'),
        "holds quant_type 'fp4'; expected nf4",
    ),
    "a dtype that there is not": (
        _blob(
            b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float33", "shape": [32, 64], "nested_blocksize": 256, '
            b'"nested_dtype": "float32", "nested_offset": 1.0}'
        ),
        "dtype is 'float33'",
    ),
    "another shape": (
        _blob(
            b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 32], "nested_blocksize": 256, '
            b'"nested_dtype": "float32", "nested_offset": 1.0}'
        ),
        r"shape \(64, 32\); expected \(32, 64\)",
    ),
    "blocksize zero": (
        _blob(b'{"quant_type": "nf4", "blocksize": 0, "dtype": "float32", "shape": [32, 64]}'),
        "blocksize is 0; expected a positive",
    ),
    "a blocksize that 4 bits do not have": (
        _blob(
            b'{"quant_type": "nf4", "blocksize": 66, "dtype": "float32", "shape": [32, 64], "nested_blocksize": 256, '
            b'"nested_dtype": "float32", "nested_offset": 1.0}'
        ),
        "blocksize is 66",
    ),
    "a mean that is no number": (
        _blob(
            b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [32, 64], "nested_blocksize": 256, '
            b'"nested_dtype": "float32", "nested_offset": "much"}'
        ),
        "nested_offset is 'much'",
    ),
    "foreign key": (
        lambda saved: saved.update({"weight.SCB": torch.zeros(32)}),
        "foreign keys in the quant_state: SCB",
    ),
    "two states": (
        lambda saved: saved.update({"weight.quant_state.bitsandbytes__fp4": saved[NESTED_KEYS[-1]]}),
        "2 packed quant_state items",
    ),
    "all states stripped": (
        lambda saved: [saved.pop(key) for key in NESTED_KEYS[2:]].clear(),
        r"packed 4-bit codes of shape \(1024, 1\) without their weight",
    ),
    "bias of another length": (_cut("bias"), r"bias has shape \(31,\); expected \(32,\)"),
    "codes of no storage dtype": (
        lambda saved: saved.update({"weight": saved["weight"].reshape(-1).view(torch.int64).view(-1, 1)}),
        "int64",
    ),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("target", ["fresh", "quantized"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_dict_is_one_readable_error_and_changes_nothing(damage: str, target: str, strict: bool) -> None:
    apply, message = DAMAGES[damage]
    saved = dict(layer_of().state_dict())
    apply(saved)
    layer = TARGETS[target]()
    before, weight, bias = snapshot(layer), layer.weight, layer.bias
    with pytest.raises(RuntimeError, match=message) as caught:
        layer.load_state_dict(saved, strict=strict)
    assert str(caught.value).count("expected") <= 3
    assert snapshot(layer) == before
    assert layer.weight is weight
    assert layer.bias is bias


def test_a_plain_weight_of_another_shape_changes_nothing() -> None:
    for layer in (layer_of(move=False), layer_of()):
        before = snapshot(layer)
        with pytest.raises(RuntimeError, match=r"\(32, 65\)"):
            layer.load_state_dict(torch.nn.Linear(65, 32).state_dict())
        assert snapshot(layer) == before


def test_a_plain_weight_that_is_not_finite_is_refused_by_a_quantized_layer() -> None:
    dense = torch.nn.Linear(64, 32)
    dense.weight.data[0, 0] = float("nan")
    layer = layer_of()
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="1 NaN or inf values"):
        layer.load_state_dict(dense.state_dict())
    assert snapshot(layer) == before


def test_a_missing_bias_is_a_missing_key() -> None:
    saved = dict(layer_of().state_dict())
    del saved["bias"]
    assert layer_of(seed=1).load_state_dict(saved, strict=False).missing_keys == ["bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        layer_of(seed=1).load_state_dict(saved)


def test_a_state_dict_without_the_layer_reports_its_weight_missing() -> None:
    assert layer_of().load_state_dict({}, strict=False).missing_keys == ["weight", "bias"]


def test_loading_in_place_keeps_tied_layers_tied() -> None:
    def tied() -> torch.nn.Sequential:
        model = torch.nn.Sequential(LinearNF4(64, 64), LinearNF4(64, 64))
        model[1].weight = model[0].weight
        return model

    source, target = tied().to("cpu"), tied()
    weight = target[0].weight
    target.load_state_dict(source.state_dict())
    assert target[0].weight is target[1].weight is weight
    assert snapshot(target) == snapshot(source)
