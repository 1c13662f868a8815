"""``halfbyte merge``: its report, exit codes and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.cli.main import main

LAYER = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A small base model, and a weak adapter for it."""
    folder = tmp_path_factory.mktemp("merge")
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.002)
    adapted.save_pretrained(folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


def test_the_report_names_each_layer_with_what_it_kept(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", *folders, str(tmp_path / "out"), "--to", "bf16"]) == 0
    out = capsys.readouterr().out
    assert LAYER in out
    assert "1 weights merged into bf16; 100% of the change is in the result" in out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_lost_change_is_a_warning_with_what_to_type_and_exit_code_1(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = folders
    assert main(["merge", base, adapter, str(tmp_path / "first"), "--to", "4bit", "--single-quant"]) in (0, 1)
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "first"), adapter, str(tmp_path / "again"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["lost"] == [LAYER]
    assert report["format"] == "nf4"
    assert main(["merge", str(tmp_path / "first"), adapter, str(tmp_path / "third")]) == 1
    said = capsys.readouterr()
    assert f"undid most of the change in 1 of 1 weights: {LAYER}" in said.err
    assert "--to bf16" in said.err
    assert "lost" in said.out


def test_wrong_input_is_one_error_on_stderr_and_exit_code_2(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", folders[1], folders[0], str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("halfbyte merge: ")
    assert list(tmp_path.iterdir()) == []
