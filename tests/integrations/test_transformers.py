"""``BitsAndBytesConfig`` in transformers, with halfbyte in bitsandbytes' place: load, save, load again, dequantize."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

import halfbyte
from halfbyte.errors import CheckpointError
from halfbyte.functional import dequantize_4bit, quantize_4bit
from halfbyte.integrations.transformers import loading_line
from halfbyte.nn import Linear4bit
from tests.integrations.conftest import saved

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"
CHECKPOINTS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())

SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4 double quant": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4 double quant": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    **{
        f"nf4 in {storage}": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": storage}
        for storage in ("int8", "float16", "bfloat16", "float32", "float64")
    },
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def load(folder: Path, kind: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_compute_dtype": torch.bfloat16, **settings})
    return kind.from_pretrained(folder, quantization_config=config)


def layers(model: Any) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def weight(layer: Linear4bit) -> Tensor:
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bytes(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return set(left) == set(right) and all(
        left[key].dtype == right[key].dtype and as_bytes(left[key]) == as_bytes(right[key]) for key in left
    )


def same_numbers(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal, but for the sign of zero: bitsandbytes' CPU kernel gives FP4's code 8 one that its quant_map has not."""
    return set(left) == set(right) and all(torch.equal(left[key], right[key]) for key in left)


@each_setting
def test_every_linear_layer_holds_what_quantize_4bit_makes_of_its_weight(llama_dir: Path, settings: Any) -> None:
    model = load(llama_dir, **settings)
    plain = load_file(llama_dir / "model.safetensors")
    assert len(layers(model)) == 14
    for name, layer in layers(model).items():
        codes, state = quantize_4bit(
            plain[f"{name}.weight"],
            quant_type=settings["bnb_4bit_quant_type"],
            compress_statistics=settings.get("bnb_4bit_use_double_quant", False),
            quant_storage=getattr(torch, settings.get("bnb_4bit_quant_storage", "uint8")),
        )
        assert layer.weight.dtype == codes.dtype
        assert as_bytes(layer.weight) == as_bytes(codes)
        assert same_bytes(layer.weight.quant_state.as_dict(packed=True), state.as_dict(packed=True))
    assert type(model.lm_head) is torch.nn.Linear


def test_logits_are_those_of_a_plain_model_with_the_dequantized_weights(llama_dir: Path, tokens: Tensor) -> None:
    model = load(llama_dir, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(llama_dir)
    for name, layer in layers(model).items():
        plain.get_submodule(name).weight.data = weight(layer)
    # Activations are bf16 in both; the plain model rounds them after other sums.
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, atol=2e-2, rtol=2e-2)


@each_setting
def test_saved_loaded_and_saved_again_keeps_every_byte(
    llama_dir: Path, tmp_path: Path, tokens: Tensor, settings: Any
) -> None:
    model = load(llama_dir, **settings)
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")]
    assert same_bytes(files[0], files[1])
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert torch.equal(model(tokens).logits, third(tokens).logits)


def test_the_config_names_bitsandbytes_and_its_settings(llama_dir: Path, tmp_path: Path) -> None:
    load(llama_dir, **SETTINGS["nf4 double quant"]).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    golden = json.loads((GOLDEN / "nf4_double_quant" / "config.json").read_text())["quantization_config"]
    assert written == golden


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_bitsandbytes_wrote_gives_the_weights_that_bitsandbytes_gives(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    found = {f"{path}.weight": weight(layer) for path, layer in layers(model).items()}
    assert same_numbers(found, expected)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_bitsandbytes_wrote_is_written_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(GOLDEN / name).save_pretrained(tmp_path)
    assert same_bytes(load_file(tmp_path / "model.safetensors"), load_file(GOLDEN / name / "model.safetensors"))


@pytest.mark.parametrize("settings", [SETTINGS["nf4 double quant"], SETTINGS["fp4"]], ids=["nf4 double quant", "fp4"])
def test_vllm_finds_its_suffixes_and_uint8_codes(llama_dir: Path, tmp_path: Path, settings: Any) -> None:
    load(llama_dir, **settings).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kind = settings["bnb_4bit_quant_type"]
    suffixes = ["absmax", "quant_map", f"quant_state.bitsandbytes__{kind}"]
    if settings.get("bnb_4bit_use_double_quant"):
        suffixes += ["nested_absmax", "nested_quant_map"]
    name = "model.layers.0.mlp.up_proj.weight"
    assert {key for key in tensors if key.startswith(f"{name}.")} == {f"{name}.{suffix}" for suffix in suffixes}
    assert tensors[name].dtype == torch.uint8
    assert tensors[name].shape == (192 * 128 // 2, 1)


@pytest.mark.peer
@pytest.mark.parametrize("settings", [SETTINGS["nf4 double quant"], SETTINGS["fp4"]], ids=["nf4 double quant", "fp4"])
def test_bitsandbytes_reads_our_checkpoint_to_the_same_weights(
    llama_dir: Path, tmp_path: Path, peer_python: str, settings: Any
) -> None:
    model = load(llama_dir, **settings)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, bitsandbytes as b\nfrom transformers import AutoModelForCausalLM as A\n"
        "from safetensors.torch import save_file\n"
        "assert not b.__version__.endswith('halfbyte')\n"
        "m = A.from_pretrained(sys.argv[1])\n"
        "save_file({n: b.functional.dequantize_4bit(l.weight.data, l.weight.quant_state).contiguous()"
        " for n, l in m.named_modules() if isinstance(l, b.nn.Linear4bit)}, sys.argv[1] + '/peer.safetensors')\n"
    )
    subprocess.run([peer_python, "-c", code, str(tmp_path)], check=True, env={"OMP_NUM_THREADS": "1"})
    read = load_file(tmp_path / "peer.safetensors")
    assert same_numbers({name: weight(layer) for name, layer in layers(model).items()}, read)


def test_named_modules_are_left_alone_and_saved_as_they_were(llama_dir: Path, tmp_path: Path, tokens: Tensor) -> None:
    model = load(llama_dir, llm_int8_skip_modules=["q_proj", "model.layers.1", "lm_head"])
    assert {name.rsplit(".", 1)[-1] for name in layers(model)} == {
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert all(name.startswith("model.layers.0.") for name in layers(model))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert set(layers(again)) == set(layers(model))


def test_an_explicit_skip_list_without_the_head_quantizes_the_head(llama_dir: Path) -> None:
    assert "lm_head" in layers(load(llama_dir, llm_int8_skip_modules=["q_proj"]))


def test_conv1d_weights_are_quantized_the_right_way_round(gpt2_dir: Path, tokens: Tensor) -> None:
    model = load(gpt2_dir, bnb_4bit_quant_type="nf4")
    plain = load_file(gpt2_dir / "model.safetensors")
    assert len(layers(model)) == 8
    for name, layer in layers(model).items():
        original = plain[f"{name}.weight"].t().contiguous()
        codes, _ = quantize_4bit(original, quant_type="nf4")
        assert as_bytes(layer.weight) == as_bytes(codes)
    reference = AutoModelForCausalLM.from_pretrained(gpt2_dir)(tokens).logits
    assert torch.nn.functional.cosine_similarity(model(tokens).logits.flatten(), reference.flatten(), dim=0) > 0.95


def test_conv1d_models_are_saved_and_loaded(gpt2_dir: Path, tmp_path: Path, tokens: Tensor) -> None:
    model = load(gpt2_dir, bnb_4bit_quant_type="nf4")
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


def test_tied_heads_stay_tied_through_save_and_load(tied_dir: Path, tmp_path: Path, tokens: Tensor) -> None:
    model = load(tied_dir, bnb_4bit_quant_type="nf4")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_num_parameters_counts_weights_not_bytes(llama_dir: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(llama_dir)
    assert load(llama_dir).num_parameters() == plain.num_parameters()
    assert load(llama_dir, **SETTINGS["nf4 in bfloat16"]).num_parameters() == plain.num_parameters()


def test_a_quantized_model_refuses_another_dtype(llama_dir: Path) -> None:
    with pytest.raises(ValueError, match="cannot cast"):
        load(llama_dir).to(torch.float16)


def dequantized_close(model: Any, before: Tensor, tokens: Tensor) -> None:
    assert not layers(model)
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(model(tokens).logits, before, atol=2e-2, rtol=2e-2)


def test_dequantize_works_after_the_model_was_saved(llama_dir: Path, tmp_path: Path, tokens: Tensor) -> None:
    model = load(llama_dir, bnb_4bit_quant_type="nf4")
    before = model(tokens).logits
    model.save_pretrained(tmp_path)
    plain = model.dequantize()
    assert plain.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    dequantized_close(plain, before, tokens)


def test_a_reloaded_model_can_be_dequantized_saved_and_loaded_as_plain(tmp_path: Path) -> None:
    tokens = torch.randint(0, 64, (2, 8))
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "nf4_double_quant")
    before = model(tokens).logits
    plain = model.dequantize()
    dequantized_close(plain, before, tokens)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, plain(tokens).logits)


def test_a_dequantized_conv1d_model_is_saved_and_loaded_as_plain(
    gpt2_dir: Path, tmp_path: Path, tokens: Tensor
) -> None:
    model = load(gpt2_dir, bnb_4bit_quant_type="nf4")
    before = model(tokens).logits
    plain = model.dequantize()
    assert type(plain.transformer.h[0].attn.c_attn) is Conv1D
    dequantized_close(plain, before, tokens)
    plain.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, plain(tokens).logits)


def test_dequantize_of_a_model_without_4bit_layers_changes_nothing(
    llama_dir: Path, tokens: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(llama_dir, llm_int8_skip_modules=["model", "lm_head"])
    before = model(tokens).logits
    assert torch.equal(model.dequantize()(tokens).logits, before)
    assert "no 4-bit layer" in caplog.text


def receipt_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records if record.name == "halfbyte"]


def test_loading_logs_the_receipt_in_one_line(llama_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="halfbyte"):
        model = load(llama_dir, bnb_4bit_quant_type="nf4")
    assert receipt_lines(caplog) == [(logging.INFO, halfbyte.receipt(model, show=False).line())]


def test_a_model_that_is_mostly_not_quantized_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_QUANTIZE_EXPERTS", "0")
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=4,
    )
    load(saved(MixtralForCausalLM(config), tmp_path), bnb_4bit_quant_type="nf4")
    ((level, line),) = receipt_lines(caplog)
    assert level == logging.WARNING
    assert "less than half is quantized, the largest part left alone is model.layers.*.mlp.experts.gate_up_proj" in line


def test_fp32_on_a_device_with_fast_16_bit_products_is_a_warning_with_what_to_type(llama_dir: Path) -> None:
    found = halfbyte.receipt(load(llama_dir), show=False)
    level, line = loading_line(found, True, torch.device("mps"))
    assert level == logging.WARNING
    assert line.endswith("\nhint: BitsAndBytesConfig(..., bnb_4bit_compute_dtype=torch.float16)")
    assert loading_line(found, False, torch.device("mps")) == (logging.INFO, found.line())


def test_quiet_says_nothing(llama_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("HALFBYTE_QUIET", "1")
    with caplog.at_level(logging.INFO, logger="halfbyte"):
        load(llama_dir)
    assert receipt_lines(caplog) == []


def test_nan_in_a_weight_is_one_readable_error_with_its_name(llama_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_dir, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: .*1 NaN or inf") as caught:
        load(tmp_path)
    assert "hint:" in str(caught.value)


NAME = "model.layers.0.mlp.up_proj.weight"


def _without(tensors: dict[str, Tensor], suffix: str) -> None:
    del tensors[f"{NAME}.{suffix}"]


def _cut(tensors: dict[str, Tensor], suffix: str) -> None:
    key = f"{NAME}.{suffix}" if suffix else NAME
    tensors[key] = tensors[key][:-1].clone()


def _garbled(tensors: dict[str, Tensor], suffix: str) -> None:
    tensors[f"{NAME}.{suffix}"][5] = 0


def _swapped(tensors: dict[str, Tensor], suffix: str) -> None:
    other = NAME.replace("up_proj", suffix)
    for key in [key for key in tensors if key.startswith(other)]:
        tensors[key.replace(suffix, "up_proj")] = tensors[key].clone()


BLOB = "quant_state.bitsandbytes__nf4"
DAMAGE = {
    "absmax missing": (_without, "absmax", "lacks absmax"),
    "quant_map missing": (_without, "quant_map", "lacks quant_map"),
    "blob missing": (_without, BLOB, "neither a packed nor an unpacked quant_state"),
    "absmax cut": (_cut, "absmax", "127 values; expected"),
    "codes cut": (_cut, "", "packed weight holds 4095 bytes; expected 4096"),
    "blob garbled": (_garbled, BLOB, "no valid JSON"),
    "weight of another layer": (_swapped, "down_proj", r"shape \(64, 128\); expected \(128, 64\)"),
}


@pytest.mark.parametrize(("damage", "suffix", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_one_readable_error_with_the_weight(
    tmp_path: Path, damage: Any, suffix: str, message: str
) -> None:
    shutil.copytree(GOLDEN / "nf4_double_quant", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors, suffix)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"^{NAME}: .*{message}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_codes_without_any_scales_are_an_error_at_loading(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "fp4", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for key in [key for key in tensors if key.startswith(f"{NAME}.")]:
        del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{NAME}: packed 4-bit codes without their scales"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_base_model_loads_from_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(GOLDEN / "nf4_double_quant")
    assert len(layers(model)) == 7
