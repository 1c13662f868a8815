"""Checkpoints are read tensor by tensor; damage is one readable error with the file and the weight."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.checkpoint import Checkpoint
from halfbyte.errors import CheckpointError
from halfbyte.nn import Linear4bit

BLOB = "fc.weight.quant_state.bitsandbytes__nf4"


def tensors(nested: bool = True) -> dict[str, torch.Tensor]:
    layer = Linear4bit(64, 32, compress_statistics=nested, quant_type="nf4").to("cpu")
    return {f"fc.{key}": value.clone() for key, value in layer.state_dict().items()}


def test_tensors_come_back_by_name(tmp_path: Path) -> None:
    saved = tensors()
    save_file(saved, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        checkpoint = Checkpoint(path)
        assert set(checkpoint) == set(saved)
        assert len(checkpoint) == len(saved)
        assert all(torch.equal(checkpoint[name], saved[name]) for name in saved)


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    saved = tensors()
    names = sorted(saved)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, held in parts.items():
        save_file({name: saved[name] for name in held}, tmp_path / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint) == set(saved)
    checkpoint.check()
    assert checkpoint.quant_state("fc.weight").shape == (32, 64)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks b\.safetensors; expected every file"):
        Checkpoint(tmp_path)


def test_an_index_that_is_none_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", "{}", '{"weight_map": 5}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json is no index"):
            Checkpoint(tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_a_whole_checkpoint_passes(tmp_path: Path, nested: bool) -> None:
    save_file(tensors(nested), tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check()
    assert list(checkpoint.four_bit) == ["fc.weight"]


def test_a_checkpoint_without_4bit_weights_passes(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    Checkpoint(tmp_path).check()


def test_a_missing_file_is_a_readable_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere; expected a safetensors file, or a folder"):
        Checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 4, 100, 1000, -1])
def test_a_file_that_was_cut_short_is_a_readable_error(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cannot be read as safetensors .*; expected a whole safetensors file"):
        Checkpoint(file)


def test_a_file_of_another_format_is_a_readable_error(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    torch.save(tensors(), file)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        Checkpoint(file)


Damage = Callable[[dict[str, torch.Tensor]], object]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no absmax": (lambda t: t.pop("fc.weight.absmax"), "lacks absmax"),
    "no code map": (lambda t: t.pop("fc.weight.quant_map"), "lacks quant_map"),
    "no second level": (lambda t: t.pop("fc.weight.nested_absmax"), "there is no nested_absmax"),
    "no blob": (lambda t: t.pop(BLOB), "neither a packed nor an unpacked quant_state"),
    "no codes": (lambda t: t.pop("fc.weight"), "without its codes; expected fc.weight beside it"),
    "short codes": (lambda t: t.update({"fc.weight": t["fc.weight"][:-5]}), "holds 1019 bytes; expected 1024"),
    "long codes": (lambda t: t.update({"fc.weight": torch.cat([t["fc.weight"]] * 2)}), "holds 2048 bytes"),
    "short absmax": (lambda t: t.update({"fc.weight.absmax": t["fc.weight.absmax"][:-1]}), "with 31 values"),
    "foreign": (lambda t: t.update({"fc.weight.odd": torch.zeros(1)}), "foreign keys in the quant_state: odd"),
    "corrupt JSON": (lambda t: t[BLOB].view(-1)[0].fill_(0), "no valid JSON"),
    "plain codes": (lambda t: t.update({"fc.weight": t["fc.weight"].int()}), "quant_storage is torch.int32"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_weight_is_one_error_that_names_file_and_weight(tmp_path: Path, damage: str) -> None:
    saved = tensors()
    apply, message = DAMAGES[damage]
    apply(saved)
    save_file(saved, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.check()
    assert str(tmp_path) in str(caught.value)
    assert "fc.weight" in str(caught.value)
    assert isinstance(caught.value, ValueError)
