"""Models that are partly on the disk or sent from the host when they run, in 4 and 8 bits everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from halfbyte.nn import Linear4bit, Linear8bitLt

CPU = torch.device("cpu")
ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}
each_width = pytest.mark.parametrize("bits", [4, 8])


def config(bits: int, **settings: Any) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, **settings)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        **settings,
    )


def load(folder: Path, bits: int, device_map: Any = None, offload: Path | None = None, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=config(bits, **settings),
        device_map=device_map,
        offload_folder=offload,
    ).eval()


def layers(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (Linear4bit, Linear8bitLt))}


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@each_width
def test_a_part_on_the_disk_is_quantized_and_answers_as_in_memory(
    bits: int, llama_dir: Path, tmp_path: Path, tokens: Tensor
) -> None:
    expected = logits(load(llama_dir, bits), tokens)
    model = load(llama_dir, bits, ON_DISK, tmp_path)
    assert len(layers(model)) == 14
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.device.type == "meta"
    assert type(weight).__name__ in {"Params4bit", "Int8Params"}
    name = "model.layers.1.mlp.up_proj.weight"
    stored = load_file(tmp_path / f"{name}.safetensors")[name]
    assert stored.numel() * stored.element_size() == 192 * 128 // (2 if bits == 4 else 1)
    for _ in range(2):
        assert torch.equal(logits(model, tokens), expected)


@each_width
def test_a_quantized_checkpoint_is_read_to_the_disk(bits: int, llama_dir: Path, tmp_path: Path, tokens: Tensor) -> None:
    whole = load(llama_dir, bits)
    whole.save_pretrained(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, device_map=ON_DISK, offload_folder=tmp_path / "offload"
    ).eval()
    assert torch.equal(logits(model, tokens), logits(whole, tokens))


@each_width
def test_parts_stay_in_32_bits_where_that_is_asked_for(bits: int, llama_dir: Path, tmp_path: Path) -> None:
    model = load(llama_dir, bits, ON_DISK, tmp_path, llm_int8_enable_fp32_cpu_offload=True)
    assert layers(model) == {}


@each_width
def test_offload_with_a_hook_and_back(bits: int, llama_dir: Path, tokens: Tensor) -> None:
    model = load(llama_dir, bits)
    expected = logits(model, tokens)
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device=CPU)
    assert torch.equal(logits(model, tokens), expected)
    hook.offload()
    assert torch.equal(logits(model, tokens), expected)


@each_width
def test_dispatch_to_memory_and_disk(bits: int, llama_dir: Path, tmp_path: Path, tokens: Tensor) -> None:
    model = load(llama_dir, bits)
    expected = logits(model, tokens)
    places = {name: where for name, where in ON_DISK.items() if name != "model.rotary_emb"} | {
        "model.rotary_emb": "cpu"
    }
    model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    for _ in range(2):
        assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4", "8"])
def test_load_and_quantize_model_is_refused_by_accelerate_without_a_gpu(settings: Any, llama_dir: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/gpu/test_huggingface.py runs it")
    plain = AutoModelForCausalLM.from_pretrained(llama_dir)
    with pytest.raises(RuntimeError) as caught:
        load_and_quantize_model(plain, BnbQuantizationConfig(**settings), weights_location=str(llama_dir))
    assert "/accelerate/" in Path(caught.traceback[-1].path).as_posix()


@each_width
def test_codes_survive_every_move_of_the_model_and_of_a_layer(bits: int, llama_dir: Path, tokens: Tensor) -> None:
    model = load(llama_dir, bits)
    expected = logits(model, tokens)
    layer = model.model.layers[0].mlp.up_proj
    for action in (lambda: model.to("cpu"), lambda: layer.to("cpu"), model.cpu, lambda: layer.to(torch.device("cpu"))):
        action()
        assert torch.equal(logits(model, tokens), expected)
    layer.to("meta")
    assert layer.weight.device.type == "meta"
