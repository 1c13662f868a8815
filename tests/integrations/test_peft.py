"""peft on 4-bit models: adapters train, are saved and loaded, and merge into codes again."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoTokenizer, Trainer, TrainingArguments

from halfbyte.functional import quantize_4bit
from halfbyte.nn import Linear4bit
from tests.integrations.test_transformers import SETTINGS, as_bytes, load, weight

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
LAYER = "model.layers.1.mlp.up_proj"

ADAPTERS: dict[str, Any] = {
    "LoRA": LoraConfig(r=8, target_modules=TARGETS),
    "DoRA": LoraConfig(r=8, target_modules=TARGETS, use_dora=True),
    "OLoRA": LoraConfig(r=8, target_modules=TARGETS, init_lora_weights="olora"),
    "RandLoRA": peft.RandLoraConfig(r=8, target_modules=["q_proj", "o_proj"]),
    "PVeRA": peft.PveraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    "OFT": peft.OFTConfig(target_modules=["q_proj", "v_proj"]),
    "VeRA": peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    "HiRA": peft.HiraConfig(target_modules=["q_proj", "v_proj"]),
}
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


def text_tokens() -> Tensor:
    """English bytes as token ids: 4 rows of 48."""
    text = pydoc_data.topics.topics["assignment"].encode()[: 4 * 48]
    return torch.tensor(list(text)).view(4, 48)


def trained(
    folder: Path, adapter: Any, steps: int = 20, rate: float = 1e-2, **settings: Any
) -> tuple[Any, list[float]]:
    base = prepare_model_for_kbit_training(load(folder, **{**SETTINGS["nf4"], **settings}))
    model = get_peft_model(base, adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses, ids = [], text_tokens()
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


@pytest.mark.parametrize("name", ["nf4", "nf4 double quant", "nf4 in bfloat16", "fp4"])
def test_lora_on_4bit_learns_and_leaves_the_codes_alone(name: str, llama_dir: Path) -> None:
    model, losses = trained(llama_dir, ADAPTERS["LoRA"], **SETTINGS[name])
    assert losses[-1] < losses[0] - 1.0
    original = load(llama_dir, **SETTINGS[name]).get_submodule(LAYER).weight
    layer = model.base_model.model.get_submodule(LAYER)
    assert f"{type(layer).__module__}.{type(layer).__name__}" == "peft.tuners.lora.bnb.Linear4bit"
    assert as_bytes(layer.base_layer.weight) == as_bytes(original)
    assert layer.base_layer.weight.dtype == original.dtype


@each_adapter
def test_an_adapter_is_saved_loaded_merged_and_unloaded(adapter: Any, llama_dir: Path, tmp_path: Path) -> None:
    model, losses = trained(llama_dir, adapter, steps=5)
    assert losses[-1] < losses[0]
    ids = text_tokens()
    before = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    base = prepare_model_for_kbit_training(load(llama_dir, **SETTINGS["nf4"]))
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, before, atol=1e-4, rtol=1e-4)
    merged = model.merge_and_unload()
    layer = merged.model.layers[0].self_attn.q_proj
    assert type(layer) is Linear4bit
    assert layer.weight.bnb_quantized
    assert layer.weight.quant_state is layer.quant_state
    # Merged weights are rounded to 4 bits again: close, not equal.
    assert torch.nn.functional.cosine_similarity(merged(ids).logits.flatten(), before.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("kind", ["LoRA", "RandLoRA", "PVeRA"])
@pytest.mark.parametrize("name", ["nf4", "nf4 double quant", "nf4 in bfloat16"])
def test_merging_gives_the_codes_of_weight_plus_delta(kind: str, name: str, llama_dir: Path) -> None:
    model, _ = trained(llama_dir, ADAPTERS[kind], steps=3, **SETTINGS[name])
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    total = weight(layer.base_layer) + layer.get_delta_weight("default")
    codes, state = quantize_4bit(
        total.detach(), quant_type="nf4", compress_statistics=layer.base_layer.weight.compress_statistics
    )
    model.merge_adapter()
    merged = layer.base_layer.weight
    assert merged.dtype == load(llama_dir, **SETTINGS[name]).get_submodule(LAYER).weight.dtype
    assert as_bytes(merged) == as_bytes(codes)
    assert torch.equal(merged.quant_state.absmax, state.absmax)


def test_unmerging_brings_the_weights_back_within_the_rounding(llama_dir: Path) -> None:
    model, _ = trained(llama_dir, ADAPTERS["LoRA"], steps=3)
    layer = model.base_model.model.get_submodule(LAYER)
    before = weight(layer.base_layer)
    model.merge_adapter()
    moved = (weight(layer.base_layer) - before).norm()
    model.unmerge_adapter()
    assert layer.base_layer.weight.bnb_quantized
    # Twice rounded to 4 bits, each time by about 9 % of the norm.
    assert (weight(layer.base_layer) - before).norm() < 0.15 * before.norm()
    assert moved > 0


def test_the_trainer_trains_an_adapter_on_a_4bit_model(llama_dir: Path, tmp_path: Path) -> None:
    model = get_peft_model(prepare_model_for_kbit_training(load(llama_dir, **SETTINGS["nf4"])), ADAPTERS["LoRA"])
    rows = [{"input_ids": row, "labels": row} for row in text_tokens()]
    settings = TrainingArguments(
        tmp_path, max_steps=4, learning_rate=1e-2, use_cpu=True, report_to=[], logging_steps=1, save_strategy="no"
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_kbit_preparation_leaves_float_storage_packed(llama_dir: Path) -> None:
    model = prepare_model_for_kbit_training(load(llama_dir, **SETTINGS["nf4 in bfloat16"]))
    assert model.get_submodule(LAYER).weight.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.float32


@pytest.mark.model
def test_qlora_on_smollm2_learns_real_text_and_merges(smollm2_dir: Path, sotu_text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    ids = tokenizer(sotu_text[:3000], return_tensors="pt").input_ids[:, :256].view(8, 32)
    settings = {**SETTINGS["nf4 double quant"], "bnb_4bit_compute_dtype": torch.float32}
    base = prepare_model_for_kbit_training(load(smollm2_dir, **settings), use_gradient_checkpointing=False)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def loss_on_all() -> float:
        with torch.no_grad():
            return model.eval()(input_ids=ids, labels=ids).loss.item()

    before = loss_on_all()
    for step in range(20):
        batch = ids[[step % 8]]
        model.train()(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = loss_on_all()
    model = model.merge_and_unload()
    merged = loss_on_all()
    assert after < before - 0.2
    # The sum is rounded to 4 bits again, to which most of what was learned is lost; a broken merge gives about 10.
    assert merged < before + 0.2
