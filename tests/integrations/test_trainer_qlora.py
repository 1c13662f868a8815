"""QLoRA through transformers' Trainer: paged AdamW, gradient checkpointing, and resuming as if never stopped."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from halfbyte import optim
from tests.integrations.conftest import saved, tiny_llama
from tests.integrations.test_offload import config

pytestmark = pytest.mark.filterwarnings("ignore:.*not paged.*")

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(12)
    return saved(tiny_llama(), tmp_path_factory.mktemp("tiny"))


def rows() -> list[dict[str, Tensor]]:
    """English bytes as token ids: 32 rows of 32."""
    text = pydoc_data.topics.topics["assignment"].encode()[: 32 * 32]
    return [{"input_ids": row, "labels": row} for row in torch.tensor(list(text)).view(32, 32)]


def trainer(folder: Path, out: Path, bits: int, **settings: Any) -> Trainer:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config(bits))
    recomputed = settings.get("gradient_checkpointing", True)  # peft's helper switches it on whatever the Trainer says
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=recomputed)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=TARGETS, lora_dropout=0.1))
    arguments = TrainingArguments(
        str(out),
        **{
            "max_steps": 8,
            "learning_rate": 5e-2,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "optim": "paged_adamw_8bit",
            "save_steps": 4,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
            **settings,
        },
    )
    return Trainer(model, arguments, train_dataset=rows())


def losses(one: Trainer) -> list[float]:
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


def adapter(one: Trainer) -> dict[str, Tensor]:
    model: Any = one.model
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_that_was_stopped_ends_where_an_uninterrupted_one_does(
    bits: int, name: str, tiny_dir: Path, tmp_path: Path
) -> None:
    whole = trainer(tiny_dir, tmp_path / "whole", bits, optim=name)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0] - 0.15
    inner: Any = getattr(whole.optimizer, "optimizer", whole.optimizer)
    assert type(inner) is optim.AdamW
    assert inner.is_paged
    stopped = trainer(tiny_dir, tmp_path / "stopped", bits, optim=name)
    stopped.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(stopped) == losses(whole)
    expected = adapter(whole)
    assert all(torch.equal(value, expected[key]) for key, value in adapter(stopped).items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_gradient_checkpointing_changes_no_loss_and_no_weight(
    bits: int, reentrant: bool, tiny_dir: Path, tmp_path: Path
) -> None:
    def trained(on: bool) -> tuple[Trainer, int]:
        # The Trainer seeds dropout when it is made, not when it trains: it trains at once.
        settings = {"gradient_checkpointing": on, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        one = trainer(tiny_dir, tmp_path / str(on), bits, save_strategy="no", **settings)
        calls = []
        model: Any = one.model
        model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").register_forward_hook(
            lambda *_: calls.append(1)
        )
        one.train()
        return one, len(calls)

    plain, calls = trained(False)
    recomputed, twice = trained(True)
    assert (calls, twice) == (8, 16)
    assert losses(recomputed) == losses(plain)
    expected = adapter(plain)
    assert all(torch.equal(value, expected[key]) for key, value in adapter(recomputed).items())
