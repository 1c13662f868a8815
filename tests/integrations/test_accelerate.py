"""accelerate moves, offloads and dispatches 4-bit models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor

from halfbyte.functional import dequantize_4bit
from halfbyte.nn import Linear8bitLt, LinearNF4
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


@pytest.mark.parametrize("kind", [LinearNF4, Linear8bitLt])
def test_layers_are_made_and_copied_under_init_empty_weights(kind: Any) -> None:
    with accelerate.init_empty_weights():
        layer = kind(128, 192)
    assert layer.weight.device.type == "meta"
    assert type(copy.deepcopy(layer).weight) is type(layer.weight)


@pytest.mark.parametrize("kind", [LinearNF4, Linear8bitLt])
def test_a_parameter_whose_dict_names_requires_grad_is_moved_copied_and_loaded(kind: Any) -> None:
    layer = kind(128, 192, **({"has_fp16_weights": False} if kind is Linear8bitLt else {})).to("cpu")
    vars(layer.weight)["requires_grad"] = False
    twin = copy.deepcopy(layer).to("meta")
    assert type(twin.weight) is type(layer.weight)
    values = torch.randn(192, 128)
    layer.load_state_dict({"weight": values, "bias": torch.zeros(192)})
    torch.testing.assert_close(layer(torch.eye(128)).T, values, atol=0.6, rtol=0.2)


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
