"""peft on 8-bit models: LoRA and DoRA train, merge and unmerge, and never lose the scales; the Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import Trainer, TrainingArguments

import halfbyte.functional as F
from halfbyte.nn import Int8Params
from tests.integrations.test_int8_transformers import layers, load, logits
from tests.integrations.test_peft import text_tokens

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
LAYER = "model.layers.1.mlp.up_proj"

ADAPTERS: dict[str, Any] = {
    "LoRA": LoraConfig(r=8, target_modules=TARGETS),
    "DoRA": LoraConfig(r=8, target_modules=TARGETS, use_dora=True),
}
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


def trained(folder: Path, adapter: Any, steps: int = 20) -> tuple[Any, list[float]]:
    model = get_peft_model(prepare_model_for_kbit_training(load(folder)), adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, ids = [], text_tokens()
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


def same_scales(model: torch.nn.Module, folder: Path) -> bool:
    """Every 8-bit layer of ``model`` has the codes and scales that loading gives."""
    fresh = layers(load(folder))
    found = {name.replace("base_model.model.", "").replace(".base_layer", ""): m for name, m in layers(model).items()}
    assert found.keys() == fresh.keys()
    return all(
        torch.equal(found[name].weight.CB, fresh[name].weight.CB)
        and torch.equal(found[name].weight.SCB, fresh[name].weight.SCB)
        and torch.equal(found[name].state.SCB, fresh[name].weight.SCB)
        for name in fresh
    )


@each_adapter
def test_an_adapter_learns_and_leaves_codes_and_scales_alone(adapter: Any, llama_dir: Path) -> None:
    model, losses = trained(llama_dir, adapter)
    assert losses[-1] < losses[0] - 1.0
    layer = model.base_model.model.get_submodule(LAYER)
    assert f"{type(layer).__module__}.{type(layer).__name__}" == "peft.tuners.lora.bnb.Linear8bitLt"
    assert same_scales(model, llama_dir)


def test_dora_runs_forward_twice_and_keeps_the_scales(llama_dir: Path, tokens: Tensor) -> None:
    model = get_peft_model(load(llama_dir), ADAPTERS["DoRA"]).eval()
    first = logits(model, tokens)
    assert torch.equal(logits(model, tokens), first)
    assert same_scales(model, llama_dir)
    dense = logits(load(llama_dir), tokens)
    assert (first - dense).norm() < 0.02 * dense.norm()


@pytest.mark.parametrize("forward_first", [False, True])
@each_adapter
def test_an_adapter_merges_into_codes_and_unmerges_again(
    adapter: Any, forward_first: bool, llama_dir: Path, tokens: Tensor
) -> None:
    model, _ = trained(llama_dir, adapter)
    expected = logits(model, tokens)
    if forward_first:
        logits(model, tokens)
    dense = logits(load(llama_dir), tokens)
    model.merge_adapter()
    weight = model.base_model.model.get_submodule(LAYER).base_layer.weight
    assert type(weight) is Int8Params
    assert weight.CB is not None
    assert not same_scales(model, llama_dir)
    changed = (expected - dense).norm()
    assert (logits(model, tokens) - expected).norm() < 0.2 * changed
    model.unmerge_adapter()
    assert (logits(model, tokens) - expected).norm() < 0.2 * changed
    with model.disable_adapter():
        assert (logits(model, tokens) - dense).norm() < 0.2 * changed


@each_adapter
def test_an_adapter_is_saved_loaded_merged_and_unloaded(
    adapter: Any, llama_dir: Path, tmp_path: Path, tokens: Tensor
) -> None:
    model, _ = trained(llama_dir, adapter)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(llama_dir), tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), expected)
    changed = (expected - logits(load(llama_dir), tokens)).norm()
    merged = loaded.merge_and_unload()
    assert len(layers(merged)) == 14
    assert (logits(merged, tokens) - expected).norm() < 0.2 * changed
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert torch.equal(logits(again, tokens), logits(merged, tokens))


@pytest.mark.parametrize("forward_first", [False, True])
@each_adapter
def test_a_copy_of_a_model_with_an_adapter_keeps_its_scales(
    adapter: Any, forward_first: bool, llama_dir: Path, tokens: Tensor
) -> None:
    model = get_peft_model(load(llama_dir), adapter).eval()
    if forward_first:
        logits(model, tokens)
    for other in (copy.deepcopy(model), model.to("cpu")):
        assert same_scales(other, llama_dir)
        assert torch.equal(logits(other, tokens), logits(model, tokens))


@pytest.mark.parametrize("name", ["IA3", "AdaLoRA", "VeRA", "RandLoRA", "HiRA", "OFT"])
def test_other_adapters_run_forward_and_backward(name: str, llama_dir: Path) -> None:
    config = {
        "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "AdaLoRA": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, tinit=1, tfinal=1),
        "VeRA": peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"]),
        "RandLoRA": peft.RandLoraConfig(r=8, target_modules=["q_proj", "o_proj"]),
        "HiRA": peft.HiraConfig(target_modules=["q_proj", "v_proj"]),
        "OFT": peft.OFTConfig(target_modules=["q_proj", "v_proj"]),
    }[name]
    model = get_peft_model(prepare_model_for_kbit_training(load(llama_dir)), config).train()
    ids = text_tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable)
    assert same_scales(model, llama_dir)


def test_dequantizing_a_layer_for_an_adapter_leaves_it_usable(llama_dir: Path, tokens: Tensor) -> None:
    from peft.utils.integrations import dequantize_module_weight

    model = load(llama_dir)
    expected = logits(model, tokens)
    layer = model.get_submodule(LAYER)
    values = F.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
    for _ in range(2):
        assert torch.equal(dequantize_module_weight(layer), values)
        assert torch.equal(logits(model, tokens), expected)


def test_the_trainer_trains_an_adapter_on_8_bits(llama_dir: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(llama_dir), ADAPTERS["LoRA"])
    ids = text_tokens()
    data = [{"input_ids": row, "labels": row} for row in ids] * 4
    arguments = TrainingArguments(
        tmp_path,
        max_steps=8,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        optim="adamw_bnb_8bit",
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert same_scales(model, llama_dir)
