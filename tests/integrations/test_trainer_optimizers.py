"""transformers' Trainer with every ``optim=`` that means bitsandbytes, embeddings in 32 bits included."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from halfbyte import optim
from tests.integrations.conftest import LLAMA

CLASSES = {
    "adamw_bnb_8bit": optim.AdamW,
    "adamw_8bit": optim.AdamW,
    "paged_adamw_32bit": optim.AdamW,
    "paged_adamw_8bit": optim.AdamW,
    "lion_32bit": optim.Lion,
    "lion_8bit": optim.Lion,
    "paged_lion_32bit": optim.Lion,
    "paged_lion_8bit": optim.Lion,
    "ademamix": optim.AdEMAMix,
    "ademamix_8bit": optim.AdEMAMix,
    "paged_ademamix_32bit": optim.AdEMAMix,
    "paged_ademamix_8bit": optim.AdEMAMix,
    "rmsprop_bnb": optim.RMSprop,
    "rmsprop_bnb_8bit": optim.RMSprop,
    "rmsprop_bnb_32bit": optim.RMSprop,
}

pytestmark = pytest.mark.filterwarnings("ignore:.*not paged.*")


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Rows of one repeating pattern, which a small model learns within a few steps."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(16) * 7 + index % 4) % 256
        return {"input_ids": row, "labels": row}


def trained(name: str, folder: Path, **arguments: Any) -> Trainer:
    model = LlamaForCausalLM(LLAMA)
    args = TrainingArguments(
        str(folder),
        optim=name,
        **{
            "max_steps": 6,
            "learning_rate": 2e-3 if "lion" not in name else 3e-4,
            "per_device_train_batch_size": 8,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "weight_decay": 0.01,
            **arguments,
        },
    )
    trainer = Trainer(model, args, train_dataset=Tokens())
    trainer.train()
    return trainer


def inner(trainer: Trainer) -> Any:
    found: Any = trainer.optimizer
    return getattr(found, "optimizer", found)


def test_the_table_has_every_name_that_transformers_has() -> None:
    marks = ("bnb", "8bit", "32bit", "ademamix", "paged")
    other = {"adamw_torch_8bit", "schedule_free_adamw"}
    theirs = {one.value for one in OptimizerNames if any(mark in one.value for mark in marks)} - other
    theirs = {name for name in theirs if not name.startswith(("adamw_torch", "galore", "apollo", "stable"))}
    assert {name for name in theirs if "galore" not in name and "loftq" not in name} == set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_trainer_trains(name: str, tmp_path: Path) -> None:
    trainer = trained(name, tmp_path)
    optimizer = inner(trainer)
    assert type(optimizer) is CLASSES[name]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    eight = "8bit" in name or name in {"rmsprop_bnb_8bit"}
    model: Any = trainer.model
    state = optimizer.state[model.model.layers[0].mlp.up_proj.weight]
    assert state["state1"].dtype == (torch.uint8 if eight else torch.float32)


@pytest.mark.parametrize("name", [name for name in CLASSES if "8bit" in name])
def test_embeddings_stay_in_32_bits(name: str, tmp_path: Path) -> None:
    trainer = trained(name, tmp_path, max_steps=1)
    optimizer, model = inner(trainer), trainer.model
    assert [(module, key, config) for module, key, config in optimizer.mng.module_weight_config_triple] == [
        (model.model.embed_tokens, "weight", {"optim_bits": 32})
    ]
    assert optimizer.state[model.model.embed_tokens.weight]["state1"].dtype == torch.float32


def test_training_resumes_where_it_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = trained("adamw_8bit", tmp_path / "a", save_strategy="steps", save_steps=3)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA)
    args = TrainingArguments(
        str(tmp_path / "b"),
        optim="adamw_8bit",
        max_steps=6,
        learning_rate=2e-3,
        per_device_train_batch_size=8,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        weight_decay=0.01,
    )
    again = Trainer(model, args, train_dataset=Tokens())
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for (name, left), right in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_classes_answer_for_bitsandbytes(bnb: ModuleType) -> None:
    assert bnb.optim.AdamW is optim.AdamW
    assert bnb.optim.adamw.AdamW is optim.AdamW
    assert "bitsandbytes" in str(bnb.optim.AdamW)
    assert bnb.optim.optimizer.Optimizer2State is optim.Optimizer2State
    assert issubclass(bnb.optim.AdamW, torch.optim.Optimizer)
