"""Fused experts of transformers in 4 bits: loading, products, gradients, saving, compiling, skipping."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from halfbyte.errors import CheckpointError
from halfbyte.functional import dequantize_4bit, quantize_4bit
from halfbyte.nn import receipt
from tests.integrations.moe_models import IDS, KINDS, experts_of, load, save_random

CLOSE = 2e-5
"""Relative difference of fp32 logits: the same products of the same values, summed in another order, twice."""

NF4_ERROR = 0.11
"""Relative error of normal values in NF4: 0.09 in blocks of 64."""


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / request.param
    save_random(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    save_random("mixtral", folder)
    return folder


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_most_weights_are_in_four_bits_and_counted(saved: Path) -> None:
    found = receipt(load(saved), show=False)
    assert found.share > 0.9
    assert found.bits_per_weight < 6.5


def test_every_expert_holds_the_codes_of_its_own_matrix(saved: Path) -> None:
    model = load(saved)
    plain = save_random(saved.name, saved)
    dense = dict(plain.named_parameters())
    for name, module in model.named_modules():
        if module not in experts_of(model):
            continue
        for own in module.four_bit_names:
            stack, packed = dense[f"{name}.{own}"], getattr(module, own)
            for expert in (0, module.num_experts - 1):
                codes, _ = quantize_4bit(stack[expert], quant_type="nf4")
                size = codes.numel()
                assert torch.equal(packed.data[expert * size : (expert + 1) * size], codes)


def test_logits_and_gradients_are_those_of_the_dequantized_model(saved: Path) -> None:
    model = load(saved)
    dense = copy.deepcopy(model).dequantize()
    assert not experts_of(dense)
    grads, logits = [], []
    for each in (model, dense):
        embedded = each.get_input_embeddings()(IDS).detach().requires_grad_()
        out = each(inputs_embeds=embedded).logits
        out.square().sum().backward()
        grads.append(embedded.grad)
        logits.append(out.detach())
    assert distance(logits[0], logits[1]) < CLOSE
    assert distance(grads[0], grads[1]) < 10 * CLOSE


def test_a_saved_model_is_read_back_equal_and_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    import transformers

    model = load(saved)
    first = model(IDS).logits
    for turn in ("one", "two"):
        model.save_pretrained(tmp_path / turn)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / turn).eval()
        assert len(experts_of(again)) == len(experts_of(model))
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
        assert torch.equal(again(IDS).logits, first)
        model = again


def test_it_generates(saved: Path) -> None:
    out = load(saved).generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 15)


@pytest.mark.parametrize("patterns", [["experts", "lm_head"], ["model.layers.1", "lm_head"]], ids=str)
def test_skipped_experts_stay_as_they_are(mixtral: Path, patterns: list[str]) -> None:
    model = load(mixtral, llm_int8_skip_modules=patterns)
    assert len(experts_of(model)) == (0 if patterns[0] == "experts" else 1)
    assert model.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.float32
    left = {entry.reason for entry in receipt(model, show=False, warn=False).skipped if "experts" in entry.name}
    assert left == {"named in llm_int8_skip_modules"}


def test_a_model_with_some_layers_skipped_is_read_back_equal(mixtral: Path, tmp_path: Path) -> None:
    import transformers

    model = load(mixtral, llm_int8_skip_modules=["model.layers.1", "lm_head"])
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_variable_leaves_experts_alone_and_the_receipt_says_so(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import transformers

    monkeypatch.setenv("HALFBYTE_QUANTIZE_EXPERTS", "0")
    model = load(mixtral)
    assert not experts_of(model)
    reasons = [entry.reason for entry in receipt(model, show=False, warn=False).skipped]
    assert any("HALFBYTE_QUANTIZE_EXPERTS=0" in reason for reason in reasons)
    # Saved like this, a checkpoint has plain experts; read without the variable, they are what was saved.
    model.save_pretrained(tmp_path)
    monkeypatch.delenv("HALFBYTE_QUANTIZE_EXPERTS")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_experts_that_int8_loading_leaves_alone_are_named(mixtral: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        mixtral, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )
    reasons = {e.reason for e in receipt(model, show=False, warn=False).skipped if "experts" in e.name}
    assert reasons == {"fused experts, which only transformers' load_in_4bit quantizes"}


def test_experts_are_offloaded_by_accelerate_and_computed_where_they_are_needed(mixtral: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = load(mixtral)
    expected = model(IDS).logits
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.model.layers[0].mlp.experts.gate_up_proj.device.type == "meta"
    assert torch.equal(offloaded(IDS).logits, expected)


def test_a_damaged_stack_is_reported_by_its_name(mixtral: Path, tmp_path: Path) -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    load(mixtral).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    endings = tuple(f"layers.1.{block}.experts.down_proj.absmax" for block in ("mlp", "block_sparse_moe"))
    key = next(key for key in tensors if key.endswith(endings))
    tensors[key] = tensors[key][:-3].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\..*experts\.down_proj: absmax"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_nan_in_an_expert_is_reported_by_its_name(mixtral: Path, tmp_path: Path) -> None:
    model = save_random("mixtral", tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[3, 0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"experts\.down_proj: .* holds 1 NaN"):
        load(tmp_path)


def test_a_failed_state_dict_changes_nothing(mixtral: Path) -> None:
    layer = experts_of(load(mixtral))[0]
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    broken = {**before, "down_proj.absmax": before["down_proj.absmax"][:-1], "gate_up_proj": before["gate_up_proj"] + 1}
    with pytest.raises(RuntimeError, match="down_proj"):
        layer.load_state_dict(broken)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_a_state_dict_of_plain_values_is_quantized(mixtral: Path) -> None:
    layer = experts_of(load(mixtral))[0]
    values = {name: dequantize_4bit(getattr(layer, name).data, layer.state_of(name)) for name in layer.four_bit_names}
    before = layer.gate_up_proj.data.clone()
    layer.load_state_dict({name: value.neg() for name, value in values.items()})
    assert not torch.equal(layer.gate_up_proj.data, before)
    layer.load_state_dict(values)
    assert torch.equal(layer.gate_up_proj.data, before)


@pytest.mark.parametrize("target", ["quantized", "fresh", "on meta"])
def test_a_checkpoint_of_ours_holds_experts_too(mixtral: Path, tmp_path: Path, target: str) -> None:
    from halfbyte import checkpoint
    from halfbyte.nn.experts_4bit import Experts4bit

    layer = experts_of(load(mixtral))[0]
    checkpoint.save(layer, tmp_path / "experts.safetensors")
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.add_to("down_proj", torch.randn(other.shape_of("down_proj")))
    if target != "quantized":
        other.give_back()
        other = other.to("meta") if target == "on meta" else other
        Experts4bit.take_over(other, compute_dtype=torch.float32)
    checkpoint.load(other, tmp_path / "experts.safetensors")
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in other.state_dict().items())
    x, index, weights = torch.randn(5, 128), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    assert torch.equal(other(x, index, weights), layer(x, index, weights))


def test_a_checkpoint_of_other_experts_changes_nothing(mixtral: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from halfbyte import checkpoint

    layer = experts_of(load(mixtral))[0]
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    other = {"down_proj": "gate_up_proj", "gate_up_proj": "down_proj"}
    swapped = {".".join([other[key.split(".")[0]], *key.split(".")[1:]]): value for key, value in state.items()}
    save_file(swapped, tmp_path / "swapped.safetensors")
    with pytest.raises(CheckpointError, match="_proj has shape"):
        checkpoint.load(layer, tmp_path / "swapped.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


def test_copies_pickles_and_moves_keep_the_layer(mixtral: Path) -> None:
    model = load(mixtral)
    layer = experts_of(model)[0]
    x, index, weights = torch.randn(5, 128), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    expected = layer(x, index, weights)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("cpu"), layer.bfloat16()):
        assert type(twin).__name__ == "MixtralExperts4bit"
        assert torch.equal(twin(x, index, weights), expected)
    on_meta = copy.deepcopy(layer).to("meta")
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}
    assert layer.gate_up_proj.device.type == "cpu"


def test_the_layer_compiles_without_a_graph_break_for_forward_and_backward(mixtral: Path) -> None:
    layer = experts_of(load(mixtral))[0]
    x, index, weights = torch.randn(6, 128), torch.randint(0, 8, (6, 2)), torch.rand(6, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results: list[Any] = []
    for call in (layer, compiled):
        leaf = x.clone().requires_grad_()
        out = call(leaf, index, weights)
        out.sum().backward()
        results.append((out.detach(), leaf.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_the_whole_model_compiles_without_a_graph_break(saved: Path) -> None:
    model = load(saved).requires_grad_(False)
    logits = model(IDS, use_cache=False).logits
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert distance(compiled(IDS, use_cache=False).logits, logits) < CLOSE


def test_unquantized_models_still_choose_their_experts_implementation(mixtral: Path) -> None:
    import transformers

    logits = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            mixtral, experts_implementation=implementation, dtype=torch.float32
        )
        assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
        logits.append(model.eval()(IDS).logits)
    assert distance(logits[1], logits[0]) < CLOSE
    assert distance(logits[2], logits[0]) < CLOSE


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_lora_on_experts_gives_pefts_own_result_and_gradients(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save_random(kind, tmp_path)
    model = load(tmp_path)
    before = model(IDS).logits.detach()
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=targets)
    adapted = peft.get_peft_model(model, config)
    assert distance(adapted(IDS).logits, before) < CLOSE
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    # The same factors on the dequantized model, by peft's own way.
    changed = adapted(IDS).logits
    assert distance(changed, before) > 0.05
    changed.square().mean().backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in grads.values())
    save_random(kind, tmp_path)
    plain = peft.get_peft_model(load(tmp_path).dequantize(), config)
    mine = {name: value for name, value in adapted.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.copy_(mine[name])
    expected = plain(IDS).logits
    assert distance(changed.detach(), expected.detach()) < CLOSE
    expected.square().mean().backward()
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            assert distance(grads[name], parameter.grad) < 20 * CLOSE


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_merging_adds_the_adapter_to_the_experts_and_unmerging_takes_it_off(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save_random(kind, tmp_path)
    model = load(tmp_path)
    layer = experts_of(model)[0]
    before = dequantize_4bit(layer.down_proj.data, layer.state_of("down_proj"))
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[], target_parameters=targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    logits = adapted(IDS).logits
    (wrapper,) = (
        module
        for name, module in adapted.named_modules()
        if type(module).__name__ == "ParamWrapper" and ".layers.0." in name and module.parameter_name == "down_proj"
    )
    change = wrapper.get_delta_weight("default")
    assert change.shape == before.shape
    assert distance(before + change, before) > 0.2
    adapted.merge_adapter()
    merged = dequantize_4bit(layer.down_proj.data, layer.state_of("down_proj"))
    assert distance(merged, before + change) < NF4_ERROR
    assert distance(adapted(IDS).logits, logits) < 0.5
    adapted.unmerge_adapter()
    unmerged = dequantize_4bit(layer.down_proj.data, layer.state_of("down_proj"))
    assert distance(unmerged, before) < 2 * NF4_ERROR
