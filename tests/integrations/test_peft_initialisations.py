"""LoftQ, OLoRA and LoRA+ with quantized layers and halfbyte's optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoftQConfig, LoraConfig, get_peft_model, replace_lora_weights_loftq
from peft.optimizers import create_loraplus_optimizer
from peft.utils import loftq_utils
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from halfbyte import optim
from tests.integrations.conftest import saved, tiny_llama
from tests.integrations.test_peft_methods import logits, quantized, values

TARGETS = ["q_proj", "v_proj"]
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(6)
    return saved(tiny_llama(), tmp_path_factory.mktemp("tiny"))


def dense(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_makes_codes_and_adapter_that_are_closer_to_the_weight_than_codes_alone(
    bits: int, tiny_dir: Path
) -> None:
    weight = dense(tiny_dir).model.layers[0].self_attn.q_proj.weight.data
    base, lora_a, lora_b = loftq_utils.loftq_init(weight, num_bits=bits, reduced_rank=16, num_iter=2)
    plain, _, _ = loftq_utils.loftq_init(weight, num_bits=bits, reduced_rank=16, num_iter=1)
    assert (base + lora_b @ lora_a - weight).norm() < 0.8 * (plain - weight).norm()


def test_a_model_with_loftq_weights_is_nearer_to_the_dense_one(tiny_dir: Path) -> None:
    ids = torch.randint(0, 256, (2, 16))
    exact = logits(dense(tiny_dir), ids)
    model = get_peft_model(quantized(tiny_dir, 4), LoraConfig(r=16, target_modules="all-linear")).eval()
    before = (logits(model, ids) - exact).norm()
    replace_lora_weights_loftq(model, str(tiny_dir / "model.safetensors"))
    assert (logits(model, ids) - exact).norm() < 0.9 * before


def test_loftq_configured_as_an_initialisation_runs_on_the_cpu(tiny_dir: Path) -> None:
    config = LoraConfig(r=8, target_modules=TARGETS, init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4))
    model = get_peft_model(dense(tiny_dir), config)
    assert model.get_submodule(LAYER).lora_B["default"].weight.abs().max() > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_olora_takes_its_factors_off_the_quantized_weight(bits: int, tiny_dir: Path) -> None:
    base = quantized(tiny_dir, bits)
    before = values(base.model.layers[0].self_attn.q_proj)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=TARGETS, init_lora_weights="olora"))
    layer: Any = model.get_submodule(LAYER)
    total = values(layer.base_layer) + layer.get_delta_weight("default")
    assert layer.get_delta_weight("default").norm() > 0.1 * before.norm()
    # The rest of the weight is rounded to codes again.
    assert (total - before).norm() < (0.12 if bits == 4 else 0.01) * before.norm()


@pytest.mark.parametrize(
    "optimizer",
    [optim.AdamW, optim.AdamW8bit, optim.PagedAdamW8bit, optim.PagedAdamW32bit],
    ids=lambda one: one.__name__,
)
def test_lora_plus_gives_b_its_own_rate_and_learns(optimizer: Any, tiny_dir: Path) -> None:
    model = get_peft_model(quantized(tiny_dir, 4), LoraConfig(r=8, target_modules=[*TARGETS, "embed_tokens"]))
    made = create_loraplus_optimizer(model, optimizer, lr=1e-3, loraplus_lr_ratio=8, loraplus_lr_embedding=1e-4)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in named.items() if "lora_B" in name} == {8e-3}
    assert {rate for name, rate in named.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in named.items() if "embedding" in name} == {1e-4}
    ids: Tensor = torch.randint(0, 256, (2, 16))
    losses = []
    for _ in range(6):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        made.step()
        made.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
