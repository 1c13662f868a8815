"""Merging an adapter into a checkpoint: peft's own sums, the formats of the layers, and what survives the rounding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import halfbyte.functional as F
from halfbyte.errors import ArgumentError, CheckpointError, HalfbyteError, UnsupportedError
from halfbyte.integrations.merging import merge
from halfbyte.nn import Linear4bit, Linear8bitLt
from tests.integrations.conftest import saved, tiny_llama
from tests.integrations.peft_methods import METHODS
from tests.integrations.test_peft_methods import logits, requantized, values

LAYER = "model.layers.0.self_attn.q_proj"
OTHER = "model.layers.0.mlp.up_proj"
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block, in bf16."""
    torch.manual_seed(7)
    return saved(tiny_llama(), tmp_path_factory.mktemp("tiny"))


def dense(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def quantized_dir(folder: Path, out: Path, **settings: Any) -> Path:
    """The model, quantized and saved."""
    config = BitsAndBytesConfig(**settings)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(out)
    return out


def adapter_dir(folder: Path, out: Path, config: Any, size: float = 0.05) -> Path:
    """An adapter of random values."""
    torch.manual_seed(0)
    model = get_peft_model(dense(folder), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    model.save_pretrained(out)
    return out


def twin(folder: Path, adapter: Path) -> Any:
    """What peft merges into a dense model of the same values."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {name: m for name, m in model.named_modules() if isinstance(m, (Linear4bit, Linear8bitLt))}
    if found:
        plain = tiny_llama()
        rest = {name: p.data for name, p in model.named_parameters() if name.removesuffix(".weight") not in found}
        plain.load_state_dict({**rest, **{f"{name}.weight": values(layer) for name, layer in found.items()}})
        model = plain
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


CONFIGS: dict[str, Callable[[], Any]] = {
    **{
        name: METHODS[name].config
        for name in (
            "LoRA",
            "DoRA",
            "OFT",
            "BOFT",
            "VeRA",
            "RandLoRA",
            "RoAd",
            "HiRA",
            "MiSS",
            "SHiRA",
            "IA3",
            "AdaLoRA",
        )
    },
    "LoRA with patterns": lambda: LoraConfig(
        r=4, target_modules=TARGETS, use_rslora=True, rank_pattern={"v_proj": 8}, alpha_pattern={"down_proj": 32}
    ),
    "LoRA and a head trained whole": lambda: LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "LoRA on the embedding": lambda: LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dense_merge_is_what_peft_merges(name: str, tiny_dir: Path, tmp_path: Path) -> None:
    adapter = adapter_dir(tiny_dir, tmp_path / "adapter", CONFIGS[name]())
    survival = merge(tiny_dir, adapter, tmp_path / "out", to="bf16")
    expected, before = twin(tiny_dir, adapter), dict(dense(tiny_dir).named_parameters())
    found = dict(dense(tmp_path / "out").named_parameters())
    assert found.keys() == dict(expected.named_parameters()).keys()
    for key, value in expected.named_parameters():
        torch.testing.assert_close(found[key].data, value.data.bfloat16().float(), atol=1e-6, rtol=2**-7)
    changed = {key for key in found if not torch.equal(found[key], before[key])}
    assert {layer.name for layer in survival.layers} | set(survival.replaced) == changed


@pytest.mark.parametrize("double", [False, True])
def test_a_4bit_base_gives_the_codes_of_the_sum_and_keeps_every_other_byte(
    double: bool, tiny_dir: Path, tmp_path: Path
) -> None:
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    base = quantized_dir(tiny_dir, tmp_path / "base", load_in_4bit=True, **settings)
    adapter = adapter_dir(tiny_dir, tmp_path / "adapter", CONFIGS["LoRA"]())
    merge(base, adapter, tmp_path / "out")
    sums = twin(base, adapter).get_submodule(LAYER).weight.data
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    codes, state = F.quantize_4bit(sums, quant_type="nf4", compress_statistics=double)
    weight = model.get_submodule(LAYER).weight
    assert (weight.data != codes).float().mean() < 0.01
    torch.testing.assert_close(
        F.dequantize_4bit(weight.data, weight.quant_state).float(),
        F.dequantize_4bit(codes, state),
        atol=0.05 * float(sums.abs().max()),
        rtol=0.02,
    )
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert old.keys() == new.keys()
    assert {key for key in old if not torch.equal(old[key], new[key])} <= {
        key for key in old if ".q_proj." in key or ".v_proj." in key
    }
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out")]
    assert configs[0] == configs[1]


def test_an_8bit_base_gives_the_codes_of_the_sum(tiny_dir: Path, tmp_path: Path) -> None:
    base = quantized_dir(tiny_dir, tmp_path / "base", load_in_8bit=True)
    adapter = adapter_dir(tiny_dir, tmp_path / "adapter", CONFIGS["DoRA"]())
    survival = merge(base, adapter, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = requantized(twin(base, adapter).get_submodule(LAYER).weight.data, 8)
    torch.testing.assert_close(values(model.get_submodule(LAYER)), expected, atol=1e-6, rtol=1e-5)
    assert survival.format == "int8"
    assert survival.kept > 0.9


@pytest.mark.parametrize("to", ["4bit", "8bit"])
def test_a_dense_base_merged_into_codes_is_what_transformers_quantizes(to: str, tiny_dir: Path, tmp_path: Path) -> None:
    adapter = adapter_dir(tiny_dir, tmp_path / "adapter", CONFIGS["LoRA"]())
    merge(tiny_dir, adapter, tmp_path / "dense", to="bf16")
    merge(tiny_dir, adapter, tmp_path / "out", to=to)
    settings: dict[str, Any] = {"load_in_8bit": True}
    if to == "4bit":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    theirs = quantized_dir(tmp_path / "dense", tmp_path / "theirs", **settings)
    old, new = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "out"))
    assert old.keys() == new.keys()
    assert {key: value.dtype for key, value in old.items()} == {key: value.dtype for key, value in new.items()}
    other = f"{OTHER}.weight"
    assert all(torch.equal(old[key], new[key]) for key in old if key.startswith(other) or "norm" in key)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (theirs, tmp_path / "out")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    # The sums were rounded to bf16 in between on their way: a few codes at midpoints differ.
    ids = torch.randint(0, 256, (2, 16))
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (theirs, tmp_path / "out")
    ]
    first, second = (logits(model.eval(), ids) for model in models)
    assert (first - second).norm() < 0.05 * first.norm()


def test_a_quantized_base_merged_into_bf16_is_a_plain_model(tiny_dir: Path, tmp_path: Path) -> None:
    base = quantized_dir(tiny_dir, tmp_path / "base", load_in_4bit=True, bnb_4bit_quant_type="fp4")
    adapter = adapter_dir(tiny_dir, tmp_path / "adapter", CONFIGS["LoRA"]())
    survival = merge(base, adapter, tmp_path / "out", to="bf16")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    found = dense(tmp_path / "out")
    torch.testing.assert_close(
        found.get_submodule(LAYER).weight.data,
        twin(base, adapter).get_submodule(LAYER).weight.data,
        atol=1e-6,
        rtol=2**-7,
    )
    assert survival.kept == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("to", ["bf16", "4bit"])
def test_transposed_layers_and_biases_are_merged(to: str, tmp_path: Path) -> None:
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=256, n_positions=64, bos_token_id=0, eos_token_id=0)
    base = saved(GPT2LMHeadModel(config), tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only")
    adapter = adapter_dir(base, tmp_path / "adapter", lora)
    merge(base, adapter, tmp_path / "out", to=to)
    expected = PeftModel.from_pretrained(dense(base), adapter).merge_and_unload().transformer.h[0].attn.c_attn
    layer = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).transformer.h[0].attn.c_attn
    torch.testing.assert_close(layer.bias.float(), expected.bias, atol=1e-3, rtol=2**-7)
    found = layer.weight.data if to == "bf16" else values(layer).t()
    error = (found - expected.weight).norm() / expected.weight.norm()
    assert error < (0.005 if to == "bf16" else 0.11)


def test_a_weak_adapter_is_lost_in_4_bits_and_named_and_kept_in_bf16(tiny_dir: Path, tmp_path: Path) -> None:
    base = quantized_dir(tiny_dir, tmp_path / "base", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    adapter = adapter_dir(tiny_dir, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]), size=0.002)
    weak = merge(base, adapter, tmp_path / "4bit")
    (layer,) = weak.layers
    assert layer.name == f"{LAYER}.weight"
    assert 0 < layer.change < 0.05
    assert layer.kept < 0.5
    assert weak.lost == (layer,)
    assert f"rounding to nf4 undid most of the change in 1 of 1 weights: {LAYER}.weight" in weak.summary()
    kept = merge(base, adapter, tmp_path / "bf16", to="bf16")
    assert kept.layers[0].kept == pytest.approx(1, abs=0.05)
    assert not kept.lost
    assert json.loads((tmp_path / "4bit" / "halfbyte_merge.json").read_text())["lost"] == [f"{LAYER}.weight"]


def test_a_change_as_large_as_the_weight_survives_4_bits(tiny_dir: Path, tmp_path: Path) -> None:
    base = quantized_dir(tiny_dir, tmp_path / "base", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    adapter = adapter_dir(tiny_dir, tmp_path / "adapter", LoraConfig(r=8, target_modules=["q_proj"]), size=0.2)
    (layer,) = merge(base, adapter, tmp_path / "out").layers
    assert layer.change > 0.5
    assert layer.kept == pytest.approx(1, abs=0.05)
    assert layer.cosine > 0.95


def test_files_stay_below_the_limit_and_load_together(tiny_dir: Path, tmp_path: Path) -> None:
    adapter = adapter_dir(tiny_dir, tmp_path / "adapter", CONFIGS["LoRA"]())
    seen: list[tuple[int, int]] = []
    merge(tiny_dir, adapter, tmp_path / "one", to="4bit")
    survival = merge(
        tiny_dir, adapter, tmp_path / "many", to="4bit", shard_bytes=40_000, progress=lambda *done: seen.append(done)
    )
    files = sorted((tmp_path / "many").glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 45_000 for file in files)
    assert (
        survival.nbytes
        == json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    )
    assert seen[-1][0] == seen[-1][1] == len(seen)
    ids = torch.randint(0, 256, (1, 8))
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("one", "many"))
    assert torch.equal(logits(one, ids), logits(many, ids))


def _spoil(adapter: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def _poison(tensors: dict[str, Tensor]) -> None:
    next(value for key, value in tensors.items() if "v_proj" in key)[0, 0] = float("nan")


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors[next(key for key in tensors if "q_proj" in key and "lora_A" in key)]


def _rename(tensors: dict[str, Tensor]) -> None:
    key = next(key for key in tensors if "q_proj" in key)
    tensors[key.replace("layers.0", "layers.7")] = tensors[key].clone()


def _widen(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "lora_A" in key]:
        tensors[key] = torch.cat([tensors[key], tensors[key]], 1)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_poison, "v_proj: base and adapter add up to NaN or inf"),
        (_drop, "lacks model.layers.0.self_attn.q_proj.lora_A"),
        (_rename, "1 weights that the base model has no place for"),
        (_widen, "does not fit the base model"),
    ],
)
def test_a_damaged_or_foreign_adapter_is_one_error_and_leaves_nothing_behind(
    edit: Any, message: str, tiny_dir: Path, tmp_path: Path
) -> None:
    adapter = adapter_dir(tiny_dir, tmp_path / "adapter", CONFIGS["LoRA"]())
    _spoil(adapter, edit)
    with pytest.raises(CheckpointError, match=message):
        merge(tiny_dir, adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_wrong_folders_say_what_was_expected(tiny_dir: Path, tmp_path: Path) -> None:
    adapter = adapter_dir(tiny_dir, tmp_path / "adapter", CONFIGS["LoRA"]())
    wrong: list[tuple[type[HalfbyteError], str, tuple[Path, Path, Path]]] = [
        (CheckpointError, "no folder .*nowhere", (tmp_path / "nowhere", adapter, tmp_path / "out")),
        (CheckpointError, "no adapter at", (tiny_dir, tiny_dir, tmp_path / "out")),
        (CheckpointError, "config.json cannot be read", (adapter, adapter, tmp_path / "out")),
        (ArgumentError, "exists; expected", (tiny_dir, adapter, adapter)),
        (ArgumentError, "no folder .*deep", (tiny_dir, adapter, tmp_path / "deep" / "out")),
    ]
    for error, message, folders in wrong:
        with pytest.raises(error, match=message):
            merge(*folders)
    with pytest.raises(ArgumentError, match="format '3bit'"):
        merge(tiny_dir, adapter, tmp_path / "out", to="3bit")


def test_a_prompt_adapter_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(dense(tiny_dir), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="changes no weight"):
        merge(tiny_dir, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "OLoRA", "olora", "corda", "loftq", "lora_ga"])
@pytest.mark.filterwarnings("ignore:.*init_lora_weights.*")
def test_an_adapter_whose_initialisation_changed_the_base_is_refused(
    start: str, tiny_dir: Path, tmp_path: Path
) -> None:
    adapter = adapter_dir(tiny_dir, tmp_path / "adapter", CONFIGS["LoRA"]())
    file = adapter / "adapter_config.json"
    extra = {"loftq_config": {"loftq_bits": 4}} if start == "loftq" else {}
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": start, **extra}))
    with pytest.raises(UnsupportedError, match=f"initialised by {start}"):
        merge(tiny_dir, adapter, tmp_path / "out")


def test_a_base_of_another_quantization_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    adapter = adapter_dir(tiny_dir, tmp_path / "adapter", CONFIGS["LoRA"]())
    base = shutil.copytree(tiny_dir, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="quantized by gptq"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_an_adapter_on_tied_weights_is_refused(module: str, tied_dir: Path, tmp_path: Path) -> None:
    adapter = adapter_dir(tied_dir, tmp_path / "adapter", LoraConfig(r=4, target_modules=[module]))
    with pytest.raises(CheckpointError, match="tie"):
        merge(tied_dir, adapter, tmp_path / "out")


@pytest.mark.model
def test_smollm2_keeps_in_bf16_what_it_learned_and_is_told_what_4_bits_undo(
    smollm2_dir: Path, sotu_text: str, tmp_path: Path
) -> None:
    ids = (
        AutoTokenizer.from_pretrained(smollm2_dir)(sotu_text[:1500], return_tensors="pt").input_ids[:, :48].view(2, 24)
    )
    base = quantized_dir(
        smollm2_dir,
        tmp_path / "base",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = get_peft_model(dense(base), LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    def loss(one: Any) -> float:
        with torch.no_grad():
            return one.eval()(input_ids=ids, labels=ids).loss.item()

    before = loss(model)
    for _ in range(4):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = loss(model)
    assert after < before - 0.2
    model.save_pretrained(tmp_path / "adapter")
    plain = merge(base, tmp_path / "adapter", tmp_path / "bf16", to="bf16")
    coarse = merge(base, tmp_path / "adapter", tmp_path / "4bit")
    assert len(plain.layers) == len(coarse.layers) == 60
    assert loss(dense(tmp_path / "bf16")) == pytest.approx(after, abs=0.05)
    assert plain.kept == pytest.approx(1, abs=0.02)
    assert coarse.kept < 0.5
    assert loss(dense(tmp_path / "4bit")) > after + 0.1
