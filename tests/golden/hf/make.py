"""Writes the checkpoints of this folder with bitsandbytes 0.50.2: run it with an interpreter that has it.

python tests/golden/hf/make.py

Each folder is what ``save_pretrained`` wrote for a small random Llama, with ``expected.safetensors`` beside it: the
weights as bitsandbytes dequantizes them, in bf16. ``pickled_layer.pt`` is a whole layer, an input and its output.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "nf4_double_quant": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4_bfloat16_storage": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
}


def main() -> None:
    """Write every folder anew."""
    import bitsandbytes as bnb
    import torch
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    with tempfile.TemporaryDirectory() as plain:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)
        for name, settings in CHECKPOINTS.items():
            wanted = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16", **settings)
            model = LlamaForCausalLM.from_pretrained(plain, quantization_config=wanted)
            model.save_pretrained(HERE / name)
            weights = {
                f"{path}.weight": bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                for path, module in model.named_modules()
                if isinstance(module, bnb.nn.Linear4bit)
            }
            save_file({key: value.contiguous() for key, value in weights.items()}, HERE / name / "expected.safetensors")
            (HERE / name / "generation_config.json").unlink()
    layer = torch.nn.Sequential(bnb.nn.LinearNF4(64, 32, compute_dtype=torch.float32)).to("cpu").eval()
    inputs = torch.randn(3, 64)
    torch.save((layer, inputs, layer(inputs).detach()), HERE / "pickled_layer.pt")


if __name__ == "__main__":
    main()
