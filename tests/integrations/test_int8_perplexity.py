"""Perplexity of SmolLM2 in 8 bits through transformers: that of bitsandbytes on the same text and settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from halfbyte.demo import measure
from tests.support.tolerances import TOLERANCES

# bitsandbytes 0.50.2, torch 2.13.0, transformers 5.23.0, fp32 activations, 12 windows of 512 tokens, an AVX2 CPU.
# (20.9372 on an AVX-512 CPU.)
MEASURED = 20.9270
DENSE = 20.4931


@pytest.mark.model
@pytest.mark.slow
def test_perplexity_is_that_of_bitsandbytes(smollm2_dir: Path, sotu_text: str) -> None:
    ids = measure.windows(AutoTokenizer.from_pretrained(smollm2_dir), sotu_text, 12)
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_dir, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    ).eval()
    found = measure.perplexity(model, ids)
    assert found == pytest.approx(MEASURED, rel=TOLERANCES["perplexity int8"].relative)
    assert found > DENSE
