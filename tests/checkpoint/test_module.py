"""Whole modules: saved, loaded into any state of the same module, and untouched by what does not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint import load, save
from halfbyte.errors import CheckpointError
from halfbyte.nn import Linear8bitLt, LinearFP4, LinearNF4


class Model(torch.nn.Module):
    def __init__(self, seed: int = 0, move: bool = True, **named: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        named = {"compute_dtype": torch.float32, **named}
        self.embed = torch.nn.Embedding(10, 64, device=named.get("device"))
        self.body = torch.nn.ModuleList([LinearNF4(64, 96, **named), LinearFP4(96, 64, bias=False, **named)])
        self.norm = torch.nn.LayerNorm(64, device=named.get("device"))
        if move:
            self.to("cpu")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.body[1](self.body[0](self.embed(ids))))


IDS = torch.arange(10)
TARGETS: dict[str, Callable[[], Model]] = {
    "fresh": lambda: Model(1, move=False),
    "quantized": lambda: Model(1),
    "on meta": lambda: Model(1, move=False, device="meta"),
    "of another storage": lambda: Model(1, quant_storage=torch.bfloat16, compress_statistics=False),
}


def snapshot(module: torch.nn.Module) -> dict[str, bytes]:
    return {
        key: value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        for key, value in module.state_dict().items()
    }


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_a_saved_module_loads_into_every_state_of_itself(tmp_path: Path, target: str, storage: torch.dtype) -> None:
    source = Model(quant_storage=storage)
    save(source, tmp_path / "m.safetensors")
    model = TARGETS[target]()
    load(model, tmp_path / "m.safetensors")
    assert snapshot(model) == snapshot(source)
    assert torch.equal(model(IDS), source(IDS))


def test_the_file_holds_the_state_dict(tmp_path: Path) -> None:
    source = Model()
    save(source, tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert set(found) == set(source.state_dict())


def test_a_lone_layer_saves_and_loads(tmp_path: Path) -> None:
    source, layer = LinearNF4(64, 32).to("cpu"), LinearNF4(64, 32)
    save(source, tmp_path / "m.safetensors")
    load(layer, tmp_path / "m.safetensors")
    assert snapshot(layer) == snapshot(source)


def test_tied_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    def tied() -> torch.nn.Sequential:
        model = torch.nn.Sequential(LinearNF4(64, 64), LinearNF4(64, 64))
        model[1].weight = model[0].weight
        return model

    source, target = tied().to("cpu"), tied()
    save(source, tmp_path / "m.safetensors")
    load(target, tmp_path / "m.safetensors")
    assert snapshot(target) == snapshot(source)
    assert target[0].weight is target[1].weight


def test_a_dense_checkpoint_is_quantized_into_a_quantized_module(tmp_path: Path) -> None:
    dense = {
        key: value if not key.startswith("body") or key.endswith("bias") else value.float()
        for key, value in Model(5, move=False).state_dict().items()
    }
    save_file({key: value.clone() for key, value in dense.items()}, tmp_path / "m.safetensors")
    model = Model(1)
    load(model, tmp_path / "m.safetensors")
    assert snapshot(model) == snapshot(Model(5))


def edited(source: Model, edit: Callable[[dict[str, torch.Tensor]], Any], path: Path) -> Path:
    found = {key: value.clone() for key, value in source.state_dict().items()}
    edit(found)
    save_file(found, path)
    return path


W0 = "body.0.weight"
REFUSED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a damaged weight at the end": (lambda t: t.pop("body.1.weight.absmax"), r"body\.1\.weight: the quant_state lacks"),
    "a missing key": (lambda t: t.pop("norm.weight"), r"lacks norm\.weight; expected the keys of the module"),
    "a missing bias": (lambda t: t.pop("body.0.bias"), r"lacks body\.0\.bias"),
    "a missing layer": (lambda t: [t.pop(k) for k in list(t) if k.startswith("body.1")], r"lacks body\.1\.weight"),
    "a foreign key": (lambda t: t.update(extra=torch.zeros(1)), "holds foreign extra"),
    "a foreign 4-bit weight": (
        lambda t: t.update({k.replace("body.0", "body.7"): v.clone() for k, v in t.items() if k.startswith(W0)}),
        r"body\.7\.weight is a 4-bit weight, and the module has no 4-bit layer",
    ),
    "another embedding": (
        lambda t: t.update({"embed.weight": torch.zeros(11, 64)}),
        r"\(11, 64\); expected \(10, 64\)",
    ),
    "another bias": (lambda t: t.update({"body.0.bias": torch.zeros(95)}), r"body\.0\.bias has shape \(95,\)"),
    "the weight of another layer": (
        lambda t: t.update({k.replace("body.1", "body.0"): t[k].clone() for k in list(t) if k.startswith("body.1")}),
        "packed quant_state items|has shape",
    ),
}


@pytest.mark.parametrize("target", ["fresh", "quantized"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_error_and_the_module_stays_as_it_was(tmp_path: Path, case: str, target: str) -> None:
    edit, message = REFUSED[case]
    path = edited(Model(), edit, tmp_path / "m.safetensors")
    model = TARGETS[target]()
    before = snapshot(model)
    parameters = [id(parameter) for parameter in model.parameters()]
    with pytest.raises(CheckpointError, match=message) as caught:
        load(model, path)
    assert str(path) in str(caught.value)
    assert snapshot(model) == before
    assert [id(parameter) for parameter in model.parameters()] == parameters


def test_a_dense_weight_with_nan_changes_nothing(tmp_path: Path) -> None:
    dense = {key: value.clone() for key, value in Model(5, move=False).state_dict().items()}
    dense["body.1.weight"][0, 0] = float("nan")
    save_file(dense, tmp_path / "m.safetensors")
    model = Model(1)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"body\.1\.weight holds NaN or inf"):
        load(model, tmp_path / "m.safetensors")
    assert snapshot(model) == before


def test_a_truncated_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(Model(), path)
    path.write_bytes(path.read_bytes()[:-100])
    model = Model(1)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load(model, path)
    assert snapshot(model) == before


def test_without_strict_what_there_is_is_loaded(tmp_path: Path) -> None:
    def edit(found: dict[str, torch.Tensor]) -> None:
        del found["norm.weight"]
        found["extra"] = torch.zeros(1)

    source = Model()
    path = edited(source, edit, tmp_path / "m.safetensors")
    model = Model(1)
    norm = model.norm.weight.detach().clone()
    load(model, path, strict=False)
    assert torch.equal(model.norm.weight, norm)
    assert torch.equal(model.body[0].weight, source.body[0].weight)


def test_without_strict_damage_is_still_an_error(tmp_path: Path) -> None:
    path = edited(Model(), lambda found: found.pop(f"{W0}.absmax"), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="lacks absmax"):
        load(Model(1), path, strict=False)


def test_a_state_dict_with_something_else_than_tensors_is_refused(tmp_path: Path) -> None:
    class Extra(torch.nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(CheckpointError, match="_extra_state is dict; expected tensors"):
        save(Extra(2, 2), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_module_is_saved_over_the_file_it_was_loaded_from(tmp_path: Path) -> None:
    source, path = Model(), tmp_path / "m.safetensors"
    save(source, path)
    for target in ("on meta", "fresh"):
        model = TARGETS[target]()
        load(model, path)
        save(model, path)
        assert snapshot(model) == snapshot(source)
        again = Model(2)
        load(again, path)
        assert snapshot(again) == snapshot(source)


def mixed(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(Linear8bitLt(64, 32, has_fp16_weights=False), LinearNF4(32, 16))


@pytest.mark.parametrize("moved", [False, True])
def test_8bit_layers_are_saved_and_loaded_beside_4bit_ones(tmp_path: Path, moved: bool) -> None:
    source, path = mixed().to("cpu"), tmp_path / "m.safetensors"
    save(source, path)
    model = mixed(1).to("cpu") if moved else mixed(1)
    load(model, path)
    assert snapshot(model) == snapshot(source)


@pytest.mark.parametrize("key", ["0.SCB", "0.weight"])
@pytest.mark.parametrize("moved", [False, True])
def test_half_an_8bit_weight_changes_nothing(tmp_path: Path, moved: bool, key: str) -> None:
    found = {name: value.clone() for name, value in mixed().to("cpu").state_dict().items()}
    del found[key]
    save_file(found, tmp_path / "m.safetensors")
    model = mixed(1).to("cpu") if moved else mixed(1)
    before = snapshot(model)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=rf"lacks {key}|0\.SCB without the other"):
            load(model, tmp_path / "m.safetensors", strict=strict)
        assert snapshot(model) == before
