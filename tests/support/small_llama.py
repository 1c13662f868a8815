"""A small Llama in 4 bits, with and without adapters, on any device."""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.nn import LinearNF4

__all__ = ["TOKENS", "adapted_llama", "gradients", "small_llama"]

TOKENS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(3))


def small_llama(device: str = "cpu", dtype: torch.dtype = torch.float32, layers: int = 2) -> Any:
    """A Llama whose linear layers but the head are in NF4; seven a block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and name != "lm_head":
                layer = LinearNF4(child.in_features, child.out_features, bias=False, compute_dtype=dtype)
                layer.weight.data = child.weight.data
                setattr(parent, name, layer)
    return model.to(device).eval()


def adapted_llama(device: str = "cpu", dtype: torch.dtype = torch.float32, layers: int = 2) -> Any:
    """That model with LoRA on two projections of a block, ready for training."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = small_llama(device, dtype, layers)
    torch.manual_seed(1)
    return get_peft_model(model, config).train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all gradients by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
