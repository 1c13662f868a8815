"""Quantized embedding tables and bitsandbytes' float ones: what they look up, keep, save and refuse."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import halfbyte.functional as HF
from halfbyte.checkpoint import load, save
from halfbyte.errors import ArgumentError, QuantStateMissingError, UnsupportedError
from halfbyte.nn import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Linear4bit,
    Params4bit,
    StableEmbedding,
    receipt,
)
from halfbyte.optim import Adam8bit
from halfbyte.optim.manager import GlobalOptimManager

IDS = torch.tensor([[0, 7, 99], [1, 1, 50]])
KINDS: dict[str, Any] = {
    "fp4": lambda **named: EmbeddingFP4(100, 128, **named),
    "nf4": lambda **named: EmbeddingNF4(100, 128, **named),
    "int8": lambda **named: Embedding8bit(100, 128, **named),
}


def table(layer: Any) -> torch.Tensor:
    """All values of a quantized layer."""
    if isinstance(layer, Embedding8bit):
        return HF.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    return HF.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_look_up_gives_rows_of_the_quantized_table_in_the_layers_dtype(kind: str, dtype: torch.dtype) -> None:
    layer = KINDS[kind](dtype=dtype)
    plain = layer.weight.data.clone()
    layer = layer.to("cpu")
    rows = layer(IDS)
    assert rows.dtype == dtype
    assert torch.equal(rows, F.embedding(IDS, table(layer).to(dtype)))
    error = (table(layer).float() - plain.float()).norm() / plain.float().norm()
    assert 0 < error < (0.02 if kind == "int8" else 0.14)


@pytest.mark.parametrize("width", [1, 63, 65, 100])
def test_any_width_works(width: int) -> None:
    layer = EmbeddingNF4(100, width).to("cpu")
    assert torch.equal(layer(IDS), table(layer)[IDS])


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_a_plain_layer_load_before_and_after_the_move(kind: str) -> None:
    plain = torch.nn.Embedding(100, 128)
    first, second = KINDS[kind](), KINDS[kind]().to("cpu")
    first.load_state_dict(plain.state_dict())
    first = first.to("cpu")
    second.load_state_dict(plain.state_dict())
    assert torch.equal(first(IDS), second(IDS))
    assert (first(IDS) - plain(IDS)).norm() / plain(IDS).norm() < 0.14


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_holds_codes_and_scales_and_loads_strictly_into_any_layer(kind: str) -> None:
    source = KINDS[kind]().to("cpu")
    state = source.state_dict()
    assert set(state) == (
        {"weight", "SCB", "weight_format"}
        if kind == "int8"
        else {"weight", "weight.absmax", "weight.quant_map", f"weight.quant_state.bitsandbytes__{kind}"}
    )
    for target in (KINDS[kind](), KINDS[kind]().to("cpu")):
        target.load_state_dict(state)
        assert torch.equal(target(IDS), source(IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_files_copies_and_pickles_look_up_the_same(kind: str, tmp_path: Any) -> None:
    source = KINDS[kind]().to("cpu")
    file = tmp_path / "table.safetensors"
    save(torch.nn.Sequential(source), file)
    target = torch.nn.Sequential(KINDS[kind]())
    load(target, file)
    buffer = io.BytesIO()
    torch.save(source, buffer)
    buffer.seek(0)
    for twin in (target[0], copy.deepcopy(source), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(IDS), source(IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_have_no_gradient_and_what_follows_trains(kind: str) -> None:
    model = torch.nn.Sequential(KINDS[kind](), torch.nn.Linear(128, 4)).to("cpu")
    assert not model[0].weight.requires_grad
    model(IDS).pow(2).sum().backward()
    assert model[1].weight.grad is not None
    assert model[0].weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_conversions_change_what_is_returned_and_never_the_codes(kind: str) -> None:
    layer = KINDS[kind]().to("cpu")
    codes, rows = layer.weight.data.clone(), layer(IDS)
    layer = layer.to(torch.bfloat16)
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(layer(IDS), rows.to(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_move_the_error_says_what_to_call(kind: str) -> None:
    with pytest.raises(QuantStateMissingError, match=r'hint: call layer.to\("cuda"\)'):
        KINDS[kind]()(IDS)


def test_an_index_outside_the_table_names_it() -> None:
    with pytest.raises(ArgumentError, match="index 100 into a table of 100 rows"):
        EmbeddingNF4(100, 64).to("cpu")(torch.tensor([100]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_look_up_compiles_whole(kind: str) -> None:
    layer = KINDS[kind]().to("cpu")
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(IDS), layer(IDS))


def test_a_head_may_share_the_packed_table() -> None:
    tokens = Embedding4bit(100, 128, quant_type="nf4")
    head = Linear4bit(128, 100, bias=False, compute_dtype=torch.float32)
    head.weight = tokens.weight
    model = torch.nn.Sequential(tokens, head).to("cpu")
    assert model[0].weight is model[1].weight
    expected = table(tokens)[IDS] @ table(tokens).T
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-4)
    assert receipt(model, show=False).formats == {"nf4": 100 * 128}
    twin = torch.nn.Sequential(Embedding4bit(100, 128), Linear4bit(128, 100, False, torch.float32))
    twin[1].weight = twin[0].weight
    twin.load_state_dict(model.state_dict())
    assert type(twin[0].weight) is Params4bit
    assert torch.equal(twin(IDS), model(IDS))


class Scaled(torch.nn.Embedding):
    """As Gemma's: the rows times a number."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width, padding_idx=0)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.scale


class Reads(torch.nn.Embedding):
    """Reads its table itself."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight * 2)


@pytest.mark.parametrize("base", [Embedding4bit, Embedding8bit])
def test_a_subclass_keeps_what_it_adds_to_a_look_up(base: Any) -> None:
    source = Scaled(100, 128)
    layer = base.from_embedding(source).to("cpu")
    assert isinstance(layer, (Scaled, base))
    assert layer.padding_idx == 0
    assert torch.equal(layer(IDS), table(layer)[IDS] * 3.0)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(IDS), layer(IDS))
    assert torch.equal(copy.deepcopy(layer)(IDS), layer(IDS))


def test_a_layer_that_reads_or_changes_its_table_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Reads reads its table itself"):
        Embedding4bit.from_embedding(Reads(4, 64))
    with pytest.raises(UnsupportedError, match=r"max_norm=1.0 changes its table"):
        Embedding8bit.from_embedding(torch.nn.Embedding(4, 64, max_norm=1.0))


@pytest.mark.parametrize("kind", [Embedding, StableEmbedding])
def test_8bit_optimizers_keep_the_states_of_a_float_table_in_32_bits(kind: Any) -> None:
    torch.manual_seed(0)
    layer = kind(100, 128, padding_idx=3)
    (found,) = (c for m, n, c in GlobalOptimManager.get_instance().module_weight_config_triple if m is layer)
    assert found == {"optim_bits": 32}
    optimizer = Adam8bit(layer.parameters(), min_8bit_size=1)
    layer(IDS).pow(2).sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["state1"].dtype == torch.float32
    bound = (6 / (100 + 128)) ** 0.5
    assert layer.weight.detach()[4:].abs().max() <= bound + 1e-2
    assert torch.equal(kind(100, 128, padding_idx=3).weight[3], torch.zeros(128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_stable_embedding_normalises_in_full_precision_and_returns_its_own_dtype(dtype: torch.dtype) -> None:
    layer = StableEmbedding(100, 128, dtype=dtype)
    rows = layer(IDS)
    assert rows.dtype == dtype
    expected = F.layer_norm(layer.weight.float()[IDS], (128,))
    torch.testing.assert_close(rows.float(), expected, rtol=0, atol=2e-3)
    assert set(layer.state_dict()) == {"weight", "norm.weight", "norm.bias"}
