"""accelerate moves, offloads and dispatches 4-bit models."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor

from halfbyte.functional import dequantize_4bit
from halfbyte.nn import LinearNF4
from tests.integrations.test_transformers import SETTINGS, load

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["nf4", "nf4 double quant", "nf4 in bfloat16"])
def test_cpu_offload_keeps_the_logits_and_the_scales(name: str, llama_dir: Path, tokens: Tensor) -> None:
    model = load(llama_dir, **SETTINGS[name])
    before = model(tokens).logits
    accelerate.cpu_offload(model, execution_device=CPU)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.device.type == "meta"
    for _ in range(2):
        assert torch.equal(model(tokens).logits, before)
    assert all(tensor.device == CPU for tensor in layer.quant_state.tensors())


def test_disk_offload_keeps_the_logits(llama_dir: Path, tmp_path: Path, tokens: Tensor) -> None:
    model = load(llama_dir, **SETTINGS["nf4 double quant"])
    before = model(tokens).logits
    accelerate.disk_offload(model, tmp_path, execution_device=CPU)
    assert torch.equal(model(tokens).logits, before)


def test_dispatch_and_hooks_keep_the_logits(llama_dir: Path, tokens: Tensor) -> None:
    model = load(llama_dir, **SETTINGS["nf4"])
    before = model(tokens).logits
    model = accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(model(tokens).logits, before)


def test_setting_a_plain_tensor_on_a_layer_on_meta_quantizes_it() -> None:
    layer = LinearNF4(128, 192, bias=False, device="meta")
    value = torch.randn(192, 128, dtype=torch.bfloat16)
    set_module_tensor_to_device(layer, "weight", "cpu", value=value)
    assert layer.weight.bnb_quantized
    error = (dequantize_4bit(layer.weight.data, layer.weight.quant_state) - value).norm() / value.norm()
    assert error < 0.1


def test_a_prepared_model_trains_on_the_cpu(llama_dir: Path) -> None:
    peft = pytest.importorskip("peft")
    accelerator = accelerate.Accelerator(cpu=True)
    model = peft.get_peft_model(load(llama_dir, **SETTINGS["nf4"]), peft.LoraConfig(target_modules=["up_proj"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.randint(0, 256, (1, 8))
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    assert sum(p.grad is not None for p in model.parameters()) == 4
