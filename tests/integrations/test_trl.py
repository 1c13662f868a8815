"""trl's SFTTrainer on a quantized model with a LoRA adapter; runs where trl is installed."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.integrations.conftest import saved, tiny_llama
from tests.integrations.test_offload import config

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:254]
    vocabulary = {letter: index for index, letter in enumerate(["<pad>", "</s>", *alphabet])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("bits", [4, 8])
def test_sft_learns_real_text(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(13)
    base = saved(tiny_llama(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config(bits))
    text = pydoc_data.topics.topics["assignment"]
    data = datasets.Dataset.from_dict({"text": [text[start : start + 60] for start in range(0, 960, 60)]})
    arguments = trl.SFTConfig(
        str(tmp_path / "out"),
        max_steps=6,
        learning_rate=5e-2,
        per_device_train_batch_size=4,
        optim="paged_adamw_8bit",
        gradient_checkpointing=True,
        bf16=False,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        max_length=64,
    )
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    trainer: Any = trl.SFTTrainer(
        model, args=arguments, train_dataset=data, processing_class=tokenizer(), peft_config=lora
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
