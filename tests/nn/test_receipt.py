"""The receipt counts every weight once and gives each one that is not quantized its right reason."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import halfbyte
from halfbyte.nn import Linear4bit, LinearFP4, LinearNF4
from halfbyte.nn.left_alone import Reasons
from halfbyte.nn.receipt import Receipt, count


def llama(**changes: Any) -> LlamaForCausalLM:
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 128,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)


def quantized(model: Any, kind: Any = LinearNF4, *, skip: tuple[str, ...] = ("lm_head",), **settings: Any) -> Any:
    """The model with its plain linear layers replaced, as a loader does it."""
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and not any(part in name for part in skip):
            layer = kind(module.in_features, module.out_features, module.bias is not None, **settings)
            layer.weight.data = module.weight.data
            if module.bias is not None:
                layer.bias = module.bias
            model.set_submodule(name, layer.to("cpu"))
    return model


def reasons(model: Any) -> dict[str, str]:
    return {entry.name: entry.reason for entry in count(model).skipped}


def test_numbers_of_a_double_quantized_layer_are_exact() -> None:
    found = count(torch.nn.Sequential(LinearNF4(64, 128, bias=False, compute_dtype=torch.bfloat16).to("cpu")))
    codes, absmax, code, second = 64 * 128 // 2, 128, 16 * 4, 4 + 256 * 4 + 4
    assert found.quantized_nbytes == found.nbytes == codes + absmax + code + second
    assert found.original_nbytes == 64 * 128 * 4
    assert (found.weights, found.quantized_weights, found.share) == (8192, 8192, 1.0)
    assert found.formats == {"nf4, double quant": 8192}
    assert found.bits_per_weight == pytest.approx(8 * found.nbytes / 8192)


def test_every_weight_is_counted_once_and_bytes_are_those_of_the_tensors() -> None:
    model = quantized(llama(tie_word_embeddings=True))
    found = count(model)
    assert found.weights == llama(tie_word_embeddings=True).num_parameters()
    assert found.quantized_weights + sum(entry.weights for entry in found.skipped) == found.weights
    assert found.original_nbytes == 2 * found.weights
    tensors = {id(p): p for p in model.parameters()}.values()
    states = [t for m in model.modules() if isinstance(m, Linear4bit) for t in m.quant_state.tensors()]
    assert found.nbytes == sum(t.numel() * t.element_size() for t in (*tensors, *states))


def test_formats_are_told_apart_largest_first() -> None:
    model = torch.nn.Sequential(
        LinearFP4(64, 64, bias=False, compress_statistics=False).to("cpu"), LinearNF4(64, 128, bias=False).to("cpu")
    )
    assert list(count(model).formats.items()) == [("nf4, double quant", 8192), ("fp4", 4096)]


def test_a_tied_head_is_named_and_counted_with_the_embedding() -> None:
    found = reasons(quantized(llama(tie_word_embeddings=True)))
    assert found["model.embed_tokens.weight"] == "shared (tied) with lm_head.weight: quantizing would change both"
    assert "lm_head.weight" not in found


def test_norms_and_biases_share_a_reason_and_layers_share_a_line() -> None:
    model = quantized(llama(attention_bias=True))
    entries = {entry.name: entry for entry in count(model).skipped}
    assert entries["model.layers.*.input_layernorm.weight"].modules == 2
    assert entries["model.layers.*.self_attn.q_proj.bias"].weights == 2 * 64
    assert "a vector (bias or norm)" in entries["model.norm.weight"].reason


def test_embedding_and_unconverted_linear_layers() -> None:
    found = reasons(quantized(llama()))
    assert (
        found["model.embed_tokens.weight"]
        == "an embedding table: BitsAndBytesConfig(quantize_embeddings=True) quantizes it"
    )
    assert found["lm_head.weight"] == "a linear layer that was not converted"


def with_quantizer(model: Any, kept: list[str], asked: list[str] | None) -> Any:
    model.hf_quantizer = SimpleNamespace(
        modules_to_not_convert=kept, quantization_config=SimpleNamespace(llm_int8_skip_modules=asked)
    )
    return model


@pytest.mark.parametrize("pattern", ["q_proj", "model.layers.0.self_attn", "model.layers.0", r".*\.0\..*q_proj"])
def test_llm_int8_skip_modules_are_named_by_ending_prefix_and_regular_expression(pattern: str) -> None:
    model = with_quantizer(quantized(llama(), skip=("q_proj", "lm_head")), [pattern], [pattern])
    layer = model.model.layers[0].self_attn.q_proj
    why = Reasons(model).why("model.layers.0.self_attn.q_proj.weight", layer, layer.weight)
    assert why == "named in llm_int8_skip_modules"


def test_a_skip_pattern_stops_at_a_module_boundary() -> None:
    model = with_quantizer(
        torch.nn.ModuleDict({"layer1": torch.nn.Linear(4, 4), "layer11": torch.nn.Linear(4, 4)}), ["layer1"], ["layer1"]
    )
    found = reasons(model)
    assert found["layer1.weight"] == "named in llm_int8_skip_modules"
    assert found["layer11.weight"] == "a linear layer that was not converted"


def test_transformers_own_exceptions_are_told_from_the_users() -> None:
    model = with_quantizer(quantized(llama()), ["lm_head"], None)
    assert reasons(model)["lm_head.weight"].startswith("kept by transformers: an output head")


def test_fused_experts_are_named_with_what_quantizes_them() -> None:
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
        num_local_experts=2,
    )
    found = count(quantized(MixtralForCausalLM(config)))
    experts = next(entry for entry in found.skipped if entry.name.endswith("experts.gate_up_proj"))
    assert experts.reason == "fused experts, which only transformers' load_in_4bit quantizes"
    assert experts.weights == 2 * 128 * 64


def test_unconverted_conv1d_is_no_linear_layer() -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
    found = reasons(GPT2LMHeadModel(config))
    assert found["transformer.h.*.attn.c_attn.weight"] == "a parameter of Conv1D, which is no linear layer"


def test_a_subclass_of_linear_is_said_to_be_one() -> None:
    attention = torch.nn.MultiheadAttention(8, 2)
    text = Reasons(attention).why("out_proj.weight", attention.out_proj, attention.out_proj.weight)
    assert text == "a NonDynamicallyQuantizableLinear: only plain torch.nn.Linear is converted"


def test_adapters_are_said_to_be_trained() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    found = reasons(model)
    assert found["base_model.model.model.layers.*.self_attn.q_proj.lora_A.default.weight"] == (
        "an adapter's weight, which is trained"
    )


@pytest.mark.parametrize(
    ("settings", "activations", "expected"),
    [
        ({"compute_dtype": torch.float16}, torch.bfloat16, ("float16",)),
        ({}, torch.bfloat16, ("bfloat16 (the activations' own)",)),
        ({}, torch.float32, None),
    ],
    ids=["given", "16-bit activations", "nothing"],
)
def test_the_compute_dtype_is_the_one_that_the_layer_uses(
    settings: Any, activations: torch.dtype, expected: tuple[str, ...] | None
) -> None:
    layer = LinearNF4(64, 64, bias=False, **settings).to("cpu")
    model = torch.nn.Sequential(torch.nn.LayerNorm(64, dtype=activations), layer)
    used = str(layer.compute_dtype_for(torch.zeros(1, 64, dtype=activations))).removeprefix("torch.")
    if expected is None:
        expected = (f"{used} (chosen by halfbyte)",)
    assert count(model).compute_dtypes == expected
    assert expected[0].split()[0] == used


def test_less_than_half_warns_with_the_largest_part_and_can_be_silenced() -> None:
    model = torch.nn.Sequential(LinearNF4(64, 64).to("cpu"), torch.nn.Embedding(1000, 64))
    with pytest.warns(
        UserWarning, match=r"only 6\.\d% of the weights are quantized; .* 1\.weight \(an embedding table"
    ):
        halfbyte.receipt(model, show=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        halfbyte.receipt(model, show=False, warn=False)


def test_a_model_without_weights_has_an_empty_receipt() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = halfbyte.receipt(torch.nn.ReLU(), show=False)
    assert (found.weights, found.share, found.bits_per_weight, found.skipped) == (0, 0.0, 0.0, ())


def test_an_unquantized_4bit_layer_counts_as_left_alone() -> None:
    assert count(torch.nn.Sequential(LinearNF4(64, 64, bias=False))).share == 0.0


def test_it_prints_once_what_it_returns(capsys: pytest.CaptureFixture[str]) -> None:
    found = halfbyte.receipt(quantized(llama()))
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    assert isinstance(found, Receipt)
    for text in (
        "81.9 k of 98.6 k weights (83.1%)",
        "bits per weight",
        "before,",
        "left alone",
        "model.embed_tokens.weight: 8.2 k weights, 16.4 kB",
    ):
        assert text in printed


def test_the_line_says_share_formats_bits_memory_and_compute_dtype() -> None:
    model = quantized(llama(), compute_dtype=torch.bfloat16)
    found = count(model)
    assert found.line() == (
        f"{found.share:.1%} of 98.6 k weights in nf4, double quant; {found.bits_per_weight:.2f} bits per weight; "
        f"197.2 kB -> {found.nbytes / 1000:.1f} kB; computes in bfloat16"
    )


@pytest.mark.model
def test_smollm2_has_the_known_share_and_size(smollm2_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = quantized(AutoModelForCausalLM.from_pretrained(smollm2_dir), compress_statistics=False)
    found = count(model)
    assert (found.weights, found.quantized_weights) == (134_515_008, 106_168_320)
    assert found.nbytes == pytest.approx(106_168_320 * 4.5 / 8 + 28_346_688 * 2, rel=1e-3)
