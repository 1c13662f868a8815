"""Perplexity of SmolLM2 in 4 bits through transformers: that of bitsandbytes on the same text and settings."""

from __future__ import annotations

import pytest
import torch

import halfbyte
from halfbyte.demo import measure
from tests.support.tolerances import TOLERANCES

# bitsandbytes 0.50.2, torch 2.13.0, transformers 5.23.0, fp32 activations, 12 windows of 512 tokens, an AVX2 CPU.
# (Under double quantization its CPU code does not pick the nearest codes: ours differ from it by 0.01 %.)
MEASURED = {("nf4", False): 26.1731, ("nf4", True): 26.2074, ("fp4", False): 28.4600}
DENSE = 20.4931


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(("quant_type", "double"), MEASURED)
def test_perplexity_equals_bitsandbytes(smollm2_dir, sotu_text: str, quant_type: str, double: bool) -> None:
    halfbyte.install_as_bitsandbytes(replace=True)
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    ids = measure.windows(AutoTokenizer.from_pretrained(smollm2_dir), sotu_text, 12)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32, quantization_config=config).eval()
    found = measure.perplexity(model, ids)
    assert found == pytest.approx(MEASURED[quant_type, double], rel=TOLERANCES["perplexity"].relative)
    assert found > DENSE
