"""Tiny random mixture-of-experts models of transformers, most of whose weights are experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

KINDS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.arange(2 * 12).reshape(2, 12) * 7 % COMMON["vocab_size"]


def config_of(kind: str) -> Any:
    import transformers

    if kind == "mixtral":
        return transformers.MixtralConfig(
            **COMMON, intermediate_size=256, num_local_experts=8, num_experts_per_tok=2, output_router_logits=False
        )
    if kind == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **COMMON, head_dim=32, moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4
        )
    if kind == "gpt_oss":
        return transformers.GptOssConfig(
            **COMMON, head_dim=32, intermediate_size=256, num_local_experts=8, num_experts_per_tok=2,
            layer_types=["full_attention", "sliding_attention"], sliding_window=16, pad_token_id=0,
        )  # fmt: skip
    latent = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    return transformers.DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4}, **latent, intermediate_size=256, moe_intermediate_size=128,
        n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4, first_k_dense_replace=1,
    )  # fmt: skip


def save_random(kind: str, folder: Path) -> Any:
    """A random fp32 model of that kind, saved in ``folder`` as its published checkpoints are. Returns the model."""
    import transformers

    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config_of(kind)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.06)
    model.save_pretrained(folder)
    return model


def load(folder: Path, **settings: Any) -> Any:
    """The model in ``folder`` with its weights in NF4, computing in fp32."""
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        **settings,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    return model.eval()


def experts_of(model: torch.nn.Module) -> list[Any]:
    from halfbyte.nn.experts_4bit import Experts4bit

    return [module for module in model.modules() if isinstance(module, Experts4bit)]
