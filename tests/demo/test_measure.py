"""The demo's measuring: perplexity from its definition, windows of 512 tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.demo import measure


def tiny(vocabulary: int = 64) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).eval()


def test_a_model_that_knows_nothing_has_its_vocabulary_as_perplexity() -> None:
    model = tiny()
    torch.nn.init.zeros_(model.lm_head.weight)
    ids = torch.randint(0, 64, (2, 40))
    assert measure.perplexity(model, ids) == pytest.approx(64, rel=1e-5)


def test_perplexity_is_the_exponential_of_the_mean_loss_of_all_windows() -> None:
    model = tiny()
    ids = torch.randint(0, 64, (3, 20))
    losses = [model(window[None], labels=window[None]).loss.item() for window in ids]
    assert measure.perplexity(model, ids) == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)


def test_windows_are_consecutive_tokens() -> None:
    def tokenizer(text: str, return_tensors: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.arange(len(text))[None])

    ids = measure.windows(tokenizer, "x" * 2000, 3)
    assert ids.shape == (3, 512)
    assert ids.flatten().tolist() == list(range(1536))
