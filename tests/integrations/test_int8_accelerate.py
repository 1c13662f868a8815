"""accelerate moves, offloads and dispatches 8-bit models."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor

import halfbyte.functional as F
from halfbyte.nn import Linear8bitLt
from tests.integrations.test_int8_transformers import layers, load, logits

CPU = torch.device("cpu")


@pytest.mark.parametrize("forward_first", [False, True])
def test_cpu_offload_keeps_the_logits_and_the_scales(llama_dir: Path, tokens: Tensor, forward_first: bool) -> None:
    model = load(llama_dir)
    before = logits(load(llama_dir), tokens)
    if forward_first:
        logits(model, tokens)
    accelerate.cpu_offload(model, execution_device=CPU)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.device.type == "meta"
    for _ in range(2):
        assert torch.equal(logits(model, tokens), before)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model, tokens), before)


def test_disk_offload_keeps_the_logits(llama_dir: Path, tmp_path: Path, tokens: Tensor) -> None:
    model = load(llama_dir)
    before = logits(model, tokens)
    accelerate.disk_offload(model, tmp_path, execution_device=CPU)
    for _ in range(2):
        assert torch.equal(logits(model, tokens), before)


def test_dispatch_and_hooks_keep_the_logits(llama_dir: Path, tokens: Tensor) -> None:
    model = load(llama_dir)
    before = logits(model, tokens)
    model = accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(logits(model, tokens), before)


def test_setting_plain_values_on_a_layer_on_meta_quantizes_them() -> None:
    layer = Linear8bitLt(128, 192, bias=False, has_fp16_weights=False, device="meta")
    value = torch.randn(192, 128, dtype=torch.bfloat16)
    set_module_tensor_to_device(layer, "weight", CPU, value=value)
    layer = layer.to(CPU)
    codes, scales, _ = F.int8_vectorwise_quant(value)
    assert torch.equal(layer.weight.CB, codes)
    assert torch.equal(layer.weight.SCB, scales)


def test_setting_codes_with_their_statistics_keeps_both() -> None:
    source = Linear8bitLt(128, 192, bias=False, has_fp16_weights=False).to(CPU)
    layer = Linear8bitLt(128, 192, bias=False, has_fp16_weights=False, device="meta")
    layer.weight.data = layer.weight.data.to(torch.int8)
    set_module_tensor_to_device(layer, "weight", CPU, value=source.weight.data, fp16_statistics=source.weight.SCB)
    assert torch.equal(layer(torch.ones(2, 128)), source(torch.ones(2, 128)))


def test_a_prepared_model_trains_on_the_cpu(llama_dir: Path, tokens: Tensor) -> None:
    peft = pytest.importorskip("peft")
    accelerator = accelerate.Accelerator(cpu=True)
    model = peft.get_peft_model(load(llama_dir), peft.LoraConfig(target_modules=["up_proj"])).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    loss = model(input_ids=tokens, labels=tokens).loss
    accelerator.backward(loss)
    optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(p.grad.abs().sum() > 0 for p in trained)
    assert all(layer.weight.SCB is not None for layer in layers(model).values())
