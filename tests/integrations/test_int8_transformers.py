"""transformers' load_in_8bit: load, save, reload, re-save, move, dequantize; on Llama, tied weights and Conv1D."""

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import halfbyte.functional as F
from halfbyte.nn import Int8Params, Linear8bitLt


def load(folder: Path, dtype: torch.dtype = torch.float32, **named: Any) -> Any:
    config = BitsAndBytesConfig(load_in_8bit=True, **named)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()


def again(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def layers(model: torch.nn.Module) -> dict[str, Linear8bitLt]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear8bitLt)}


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("fixture", ["llama_dir", "tied_dir", "gpt2_dir"])
def test_a_model_loads_in_8_bits_and_answers_as_the_dense_one(
    fixture: str, request: pytest.FixtureRequest, tokens: torch.Tensor
) -> None:
    folder = request.getfixturevalue(fixture)
    model, dense = load(folder), again(folder)
    assert model.is_loaded_in_8bit
    found = layers(model)
    assert len(found) == (8 if fixture == "gpt2_dir" else 14)
    for name, layer in found.items():
        weight = dense.get_submodule(name).weight.data
        weight = weight.t() if fixture == "gpt2_dir" else weight
        codes, scales, _ = F.int8_vectorwise_quant(weight)
        assert torch.equal(layer.weight.CB, codes)
        assert torch.equal(layer.weight.SCB, scales)
        assert layer.state.threshold == 6.0
    exact = logits(dense, tokens)
    assert (logits(model, tokens) - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.parametrize("fixture", ["llama_dir", "tied_dir", "gpt2_dir"])
def test_saving_reloading_and_saving_again_is_exact(
    fixture: str, forward_first: bool, request: pytest.FixtureRequest, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = load(request.getfixturevalue(fixture))
    if forward_first:
        logits(model, tokens)
    model.save_pretrained(tmp_path / "once")
    reloaded = again(tmp_path / "once")
    assert torch.equal(logits(reloaded, tokens), logits(model, tokens))
    reloaded.save_pretrained(tmp_path / "twice")
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert set(once) == set(twice)
    assert all(torch.equal(once[key], twice[key]) for key in once)
    assert torch.equal(logits(again(tmp_path / "twice"), tokens), logits(model, tokens))


def test_a_saved_model_has_bitsandbytes_keys(llama_dir: Path, tmp_path: Path) -> None:
    model = load(llama_dir)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.0.mlp.down_proj."
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    assert {key: value.dtype for key, value in own.items()} == {
        "weight": torch.int8,
        "SCB": torch.float32,
        "weight_format": torch.uint8,
    }
    assert own["weight_format"].shape == ()


@pytest.mark.parametrize("forward_first", [False, True])
def test_a_model_moves_and_copies_with_its_scales(llama_dir: Path, tokens: torch.Tensor, forward_first: bool) -> None:
    model = load(llama_dir)
    expected = logits(load(llama_dir), tokens)
    if forward_first:
        logits(model, tokens)
    for moved in (model.to("cpu"), model.cpu(), copy.deepcopy(model)):
        assert torch.equal(logits(moved, tokens), expected)
        assert all(layer.weight.SCB is not None for layer in layers(moved).values())


def test_dequantize_gives_the_quantized_values(llama_dir: Path, tokens: torch.Tensor) -> None:
    model = load(llama_dir)
    expected = {
        name: F.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB) for name, layer in layers(model).items()
    }
    logits(model, tokens)
    dense = model.dequantize()
    assert not layers(dense)
    assert expected
    for name, values in expected.items():
        assert torch.equal(dense.get_submodule(name).weight.data, values), name


def test_threshold_and_skipped_modules_are_the_configurations(llama_dir: Path) -> None:
    model = load(llama_dir, llm_int8_threshold=3.0, llm_int8_skip_modules=["q_proj", "lm_head"])
    found = layers(model)
    assert len(found) == 12
    assert {layer.state.threshold for layer in found.values()} == {3.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_compute_in_their_own_dtype(
    llama_dir: Path, tokens: torch.Tensor, dtype: torch.dtype
) -> None:
    found = logits(load(llama_dir, dtype), tokens)
    exact = logits(again(llama_dir), tokens)
    assert (found.float() - exact).norm() < 0.05 * exact.norm()


def test_has_fp16_weight_keeps_a_trainable_weight(llama_dir: Path, tokens: torch.Tensor) -> None:
    model = load(llama_dir, llm_int8_has_fp16_weight=True)
    layer = next(iter(layers(model).values()))
    assert layer.state.has_fp16_weights
    assert layer.weight.is_floating_point()
    exact = logits(again(llama_dir), tokens)
    assert (logits(model, tokens) - exact).norm() < 0.05 * exact.norm()


def test_the_parameters_class_is_the_one_that_bitsandbytes_names(bnb: ModuleType, llama_dir: Path) -> None:
    assert bnb.nn.Int8Params is Int8Params
    assert bnb.nn.Linear8bitLt is Linear8bitLt
    assert bnb.nn.modules.Int8Params is Int8Params
    assert type(next(iter(layers(load(llama_dir)).values())).weight).__name__ == "Int8Params"
    assert bnb.matmul.__name__ == "matmul"
    assert bnb.MatmulLtState.__name__ == "MatmulLtState"


def test_a_state_dict_restores_the_whole_model_strictly(llama_dir: Path, tokens: torch.Tensor) -> None:
    model = load(llama_dir)
    given = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model, tokens)
    for layer in layers(model).values():
        layer.weight.SCB.mul_(3)
    model.load_state_dict(given, strict=True)
    assert torch.equal(logits(model, tokens), expected)
