"""What the demo measures of a causal language model: perplexity on real text, an answer, memory and time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Measured", "answer", "measure", "perplexity", "weight_bytes", "windows"]

WINDOW = 512
"""Tokens a window: the perplexity of windows of another length is another number."""


@dataclass(frozen=True)
class Measured:
    """One model's figures: bytes of its weights, seconds, tokens per second, perplexity, and what it answered."""

    nbytes: int
    load_seconds: float
    tokens_per_second: float
    perplexity: float
    text: str


def windows(tokenizer: Any, text: str, count: int) -> Tensor:
    """The first ``count`` windows of 512 tokens of ``text``, ``(count, 512)``."""
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return ids[: count * WINDOW].view(-1, WINDOW)


@torch.inference_mode()
def perplexity(model: Any, ids: Tensor, tick: Callable[[], None] = lambda: None) -> float:
    """exp of the mean negative log likelihood over all tokens but the first of each window; logits in fp32."""
    total, count = 0.0, 0
    for window in ids.to(model.device):
        logits = model(window[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += window.numel() - 1
        tick()
    return math.exp(total / count)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, question: str, new_tokens: int) -> tuple[str, float]:
    """The greedy answer to ``question``, and new tokens per second (first token included)."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    begun = time.perf_counter()
    ids = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    seconds = time.perf_counter() - begun
    return tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids) / seconds


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights, scales included, tied ones once."""
    from halfbyte.nn.receipt import receipt

    return receipt(model, show=False, warn=False).nbytes


def measure(
    load: Callable[[], Any],
    tokenizer: Any,
    ids: Tensor,
    question: str,
    new_tokens: int,
    tick: Callable[[], None],
) -> tuple[Any, Measured]:
    """Load a model and take its figures.

    Returns:
        The model, still loaded, and what was measured.
    """
    begun = time.perf_counter()
    model = load().eval()
    load_seconds = time.perf_counter() - begun
    answer(model, tokenizer, question, 2)  # compiles kernels, which is no part of the speed
    text, speed = answer(model, tokenizer, question, new_tokens)
    tick()
    return model, Measured(weight_bytes(model), load_seconds, speed, perplexity(model, ids, tick), text)
