"""transformers, peft, accelerate and FSDP with quantized layers on a GPU: moves, offload, adapters, sharding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import halfbyte
from halfbyte.nn import Linear4bit
from tests.support.sharding import needs_bytes_sharded

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.gpu

METHODS = {
    "LoRA": lambda: peft.LoraConfig(r=8, target_modules=["q_proj", "up_proj"]),
    "DoRA": lambda: peft.LoraConfig(r=8, target_modules=["q_proj", "up_proj"], use_dora=True),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj", "up_proj"]),
    "HiRA": lambda: peft.HiraConfig(target_modules=["q_proj", "up_proj"]),
    "RandLoRA": lambda: peft.RandLoraConfig(r=8, target_modules=["q_proj", "up_proj"]),
}
each_width = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    halfbyte.install_as_bitsandbytes(replace=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks, in bf16."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
        max_position_embeddings=128,
    )
    out = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    return out


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 512, (2, 24), device="cuda")


def load(folder: Path, bits: int, device_map: Any = 0, **settings: Any) -> Any:
    if bits == 8:
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, **settings)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            **settings,
        )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map=device_map, dtype=torch.bfloat16
    ).eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float().cuda()


def near(found: Tensor, expected: Tensor, share: float = 0.03) -> bool:
    # Computed on a CPU for 40 inputs of this model: moving every module's bf16 output by up to 2^-8 of itself, which is
    # more than another order of sums does, moves the logits by at most 0.012 of their norm with 4 bits and 0.022 with
    # 8, where an activation may also get another int8 code. The scales of one projection, shifted by a row, move them
    # by 0.036 at least.
    return bool((found - expected).norm() < share * expected.norm())


def quantized(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if type(p).__name__ in {"Params4bit", "Int8Params"}}


def codes(model: Any) -> dict[str, bytes]:
    return {
        name: p.data.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for name, p in model.named_parameters()
        if type(p).__name__ in {"Params4bit", "Int8Params"}
    }


@each_width
def test_a_model_moves_to_the_cpu_and_back(bits: int, folder: Path, ids: Tensor) -> None:
    model = load(folder, bits)
    before, packed = logits(model, ids), codes(model)
    for layer in [m for m in model.modules() if type(m).__name__ in {"Linear4bit", "Linear8bitLt"}]:
        layer.to("cpu")
        assert layer.weight.device.type == "cpu"
        layer.to("cuda")
    assert codes(model) == packed
    assert torch.equal(logits(model, ids), before)
    model.to("cpu")
    assert near(model(ids.cpu()).logits.float().cuda(), before)
    model.to("cuda")
    assert codes(model) == packed
    assert torch.equal(logits(model, ids), before)


@each_width
def test_the_part_on_the_cpu_stays_quantized(bits: int, folder: Path, ids: Tensor) -> None:
    model = load(folder, bits)
    expected = logits(model, ids)
    device_map = {
        "model.embed_tokens": 0,
        "model.rotary_emb": 0,
        "model.layers.0": 0,
        "model.layers.1": "cpu",
        "model.norm": 0,
        "lm_head": 0,
    }
    split = load(folder, bits, device_map)
    assert quantized(split) == quantized(model)
    assert near(logits(split, ids), expected)


@each_width
def test_cpu_offload_brings_layers_to_the_gpu_one_by_one(bits: int, folder: Path, ids: Tensor) -> None:
    model = load(folder, bits)
    expected = logits(model, ids)
    model.to("cpu")
    accelerate.cpu_offload(model, execution_device=torch.device("cuda", 0))
    for _ in range(2):
        assert torch.equal(logits(model, ids), expected)


@each_width
def test_load_and_quantize_model(bits: int, folder: Path, ids: Tensor) -> None:
    from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model

    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    exact = logits(dense, ids)
    settings: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bf16"}
    config = BnbQuantizationConfig(**settings, skip_modules=["lm_head"])
    with accelerate.init_empty_weights():
        empty = transformers.AutoModelForCausalLM.from_config(dense.config)
    model = load_and_quantize_model(
        empty, weights_location=str(folder), bnb_quantization_config=config, device_map={"": 0}
    )
    assert len(codes(model)) == 14
    assert near(logits(model, ids), exact, 0.2)


@each_width
@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_trains_merges_and_unmerges(name: str, bits: int, folder: Path, ids: Tensor) -> None:
    base = peft.prepare_model_for_kbit_training(load(folder, bits), use_gradient_checkpointing=True)
    model = peft.get_peft_model(base, METHODS[name]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = logits(model.eval(), ids)
    model.merge_adapter()
    assert near(logits(model, ids), expected, 0.3 if bits == 4 else 0.1)
    model.unmerge_adapter()
    assert torch.isfinite(logits(model, ids)).all()


def test_loftq_initialises_on_the_gpu(folder: Path) -> None:
    weight = torch.randn(256, 256, device="cuda") * 0.02
    base, lora_a, lora_b = peft.utils.loftq_utils.loftq_init(weight, num_bits=4, reduced_rank=16, num_iter=1)
    assert (base + lora_b @ lora_a - weight).norm() < (base - weight).norm()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapted(folder: Path) -> Any:
    torch.manual_seed(2)
    model = load(folder, 4)
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.float()
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, lora).train()


@pytest.mark.parametrize("kind", [pytest.param("fully_shard", marks=needs_bytes_sharded), "FSDP", "DDP"])
def test_one_sharded_process_computes_what_a_plain_one_does(
    kind: str, folder: Path, ids: Tensor, one_process: None
) -> None:
    plain = adapted(folder)
    plain(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    model = copy.deepcopy(plain)
    model.zero_grad()
    wrapped = model
    if kind == "fully_shard":
        from torch.distributed.fsdp import fully_shard

        for block in model.base_model.model.model.layers:
            fully_shard(block)
        fully_shard(model)
    elif kind == "FSDP":
        from torch.distributed.fsdp import FullyShardedDataParallel

        codes = [m.weight for m in model.modules() if isinstance(m, Linear4bit)]
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, ignored_states=codes, device_id=0)
    else:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        clean = name.replace("_fsdp_wrapped_module.", "")
        if p.requires_grad and p.grad is not None:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            assert near(grad.flatten(), expected[clean].flatten(), 0.02), name
    assert sum(p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.parameters()) == len(expected)
