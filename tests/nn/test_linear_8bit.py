"""Linear8bitLt: what it computes, trains, and keeps through moves, copies and all that callers do to its state."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from halfbyte.autograd import MatmulLtState, matmul
from halfbyte.errors import CheckpointError, QuantStateMissingError
from halfbyte.nn import Int8Params, Linear8bitLt, receipt
from tests.support.hard_inputs import DTYPES, weights
from tests.support.int8_inputs import THRESHOLD, activations
from tests.support.old_layouts import stored_as
from tests.support.parametrized import double

N, K = 24, 64


def layer_of(seed: int = 0, move: bool = True, **named: Any) -> Linear8bitLt:
    named = {"has_fp16_weights": False, "threshold": THRESHOLD, **named}
    layer = Linear8bitLt(K, N, **named)
    layer.weight.data = weights(N * K, seed=seed).view(N, K).to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias.data = weights(N, seed=seed + 1).to(layer.bias.dtype)
    return layer.to("cpu") if move else layer


def through_torch_save(layer: Linear8bitLt) -> Any:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def unset_state(layer: Linear8bitLt) -> Linear8bitLt:
    layer.state.SCB = None
    layer.state.CB = None
    layer.state.CxB = None
    del layer.state.CB
    layer.state.reset_grads()
    layer.weight.CB = None
    layer.init_8bit_state()
    return layer


def weight_moved_by_hand(layer: Linear8bitLt) -> Linear8bitLt:
    layer.weight = layer.weight.to("cpu")
    return layer


def on_meta_and_back(layer: Linear8bitLt) -> Linear8bitLt:
    codes = layer.weight.data.clone()
    bias = layer.bias.data.clone()
    layer.to("meta")
    assert layer.weight.device.type == "meta"
    layer.weight = Int8Params(codes, requires_grad=False, **vars(layer.weight)).to("cpu")
    layer.bias = torch.nn.Parameter(bias)
    return layer


KEPT: dict[str, Callable[[Linear8bitLt], Linear8bitLt]] = {
    "to": lambda layer: layer.to("cpu"),
    "to with a dtype": lambda layer: layer.to("cpu", torch.float32),
    "cpu": lambda layer: layer.cpu(),
    "weight.to": weight_moved_by_hand,
    "meta and back": on_meta_and_back,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": through_torch_save,
    "eval": lambda layer: layer.eval(),
    "train": lambda layer: layer.train(),
    "requires_grad_": lambda layer: layer.requires_grad_(False),
    "unsetting its state": unset_state,
}


@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.parametrize("name", KEPT)
def test_scales_are_kept_before_and_after_a_forward_pass(name: str, forward_first: bool) -> None:
    x, layer = activations(3, K), layer_of()
    expected = layer_of()(x)
    if forward_first:
        layer(x)
    kept = KEPT[name](layer)
    for _ in range(2):
        assert torch.equal(kept(x), expected)
        assert type(kept.weight) is Int8Params
        assert kept.weight.CB is not None
        assert torch.equal(kept.weight.SCB, layer_of().weight.SCB)
        assert torch.equal(kept.state.SCB, kept.weight.SCB)
        assert torch.equal(kept.state.CB, kept.weight.CB)


@pytest.mark.parametrize("name", ["deepcopy", "pickle", "torch.save"])
def test_a_copys_state_is_its_own(name: str) -> None:
    layer = layer_of()
    other = KEPT[name](layer)
    other.state.SCB = torch.zeros(N)
    assert layer.state.SCB.any()
    assert not other.weight.SCB.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_result_is_that_of_matmul_in_the_inputs_dtype(bias: bool, dtype: torch.dtype) -> None:
    layer, x = layer_of(bias=bias), activations(5, K, dtype)
    state = MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights, state.threshold = layer.weight.CB, layer.weight.SCB, False, THRESHOLD
    out = layer(x)
    assert out.dtype == dtype
    assert torch.equal(out, matmul(x, layer.weight.CB, state=state, bias=layer.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_in_another_dtype_is_used_and_left_as_it_is(dtype: torch.dtype) -> None:
    layer = layer_of()
    before = layer.bias.data.clone()
    layer(activations(2, K, dtype))
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.bias, before)


def test_training_and_evaluation_compute_the_same() -> None:
    layer, x = layer_of(), activations(5, K)
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert layer.state.is_training is False


def test_bf16_activations_beyond_fp16_stay_finite() -> None:
    out = layer_of()(activations(2, K, torch.bfloat16, outliers=False) * 1e6)
    assert out.isfinite().all()
    assert out.abs().max() > 65504


def test_a_layer_that_was_never_moved_quantizes_at_its_first_call() -> None:
    layer, x = layer_of(move=False), activations(3, K)
    assert layer.weight.is_floating_point()
    assert torch.equal(layer(x), layer_of()(x))
    assert layer.weight.dtype == torch.int8


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_made_in_another_dtype_quantizes_from_it(dtype: torch.dtype) -> None:
    layer = layer_of(move=False).to(dtype)
    assert layer.weight.dtype == dtype
    values = layer.weight.data.clone()
    layer = layer.to("cpu")
    assert torch.equal(layer.weight.SCB, values.float().abs().amax(1))
    assert layer.to(torch.float16).weight.dtype == torch.int8


def test_a_float_weight_is_trained() -> None:
    torch.manual_seed(0)
    layer = Linear8bitLt(K, 1, has_fp16_weights=True, threshold=THRESHOLD)
    assert layer.weight.requires_grad
    x, target = torch.randn(256, K), torch.randn(1, K)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss = (layer(x) - x @ target.t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    assert type(layer.weight) is Int8Params
    assert torch.equal(layer.eval()(x), layer.train()(x))


def test_a_float_weight_behind_a_parametrization_is_trained() -> None:
    layer, x = layer_of(has_fp16_weights=True), activations(2, K)
    double(layer, "weight")
    for _ in range(2):
        torch.testing.assert_close(layer(x), matmul(x, layer.weight, bias=layer.bias, threshold=THRESHOLD))
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original.grad.count_nonzero() > 0


def test_a_trained_layer_moves_with_its_gradient() -> None:
    layer = layer_of(has_fp16_weights=True)
    layer(activations(2, K)).sum().backward()
    layer = layer.to(torch.bfloat16)
    assert (layer.weight.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert layer.weight.requires_grad


def test_writing_to_the_state_writes_to_the_weight() -> None:
    layer, other = layer_of(), layer_of(seed=5)
    layer.state.CB, layer.state.SCB = other.weight.CB, other.weight.SCB
    x = activations(2, K)
    other.bias = layer.bias
    assert torch.equal(layer(x), other(x))


def test_an_adapter_library_replaces_the_weight_and_resets_the_state() -> None:
    layer, x = layer_of(), activations(3, K)
    layer(x)
    merged = weights(N * K, seed=9).view(N, K)
    layer.weight = Int8Params(merged.to("cpu"), requires_grad=False, has_fp16_weights=layer.weight.has_fp16_weights).to(
        layer.weight.device
    )
    layer.state.reset_grads()
    expected = layer_of(seed=9)
    expected.bias = layer.bias
    assert torch.equal(layer(x), expected(x))
    assert torch.equal(layer.state.SCB, expected.weight.SCB)


def test_a_plain_int8_parameter_without_scales_is_an_error_that_says_what_is_missing() -> None:
    layer = layer_of()
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    with pytest.raises(QuantStateMissingError, match="without their scales") as caught:
        layer(activations(1, K))
    assert "hint: load the layer's SCB key" in str(caught.value)


@pytest.mark.parametrize("has_fp16_weights", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_without_a_graph_break(has_fp16_weights: bool, requires_grad: bool) -> None:
    layer = layer_of(has_fp16_weights=has_fp16_weights)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = activations(3, K).requires_grad_(requires_grad)
    with torch.set_grad_enabled(requires_grad):
        assert torch.equal(compiled(x), layer(x))
        if requires_grad:
            compiled(x).sum().backward()
            found = x.grad.clone()
            x.grad = None
            layer(x).sum().backward()
            assert torch.equal(x.grad, found)


def test_two_layers_may_share_a_weight() -> None:
    first, second = layer_of(), layer_of(seed=3)
    second.weight = first.weight
    model = torch.nn.ModuleList([first, second]).to("cpu")
    assert model[0].weight is model[1].weight
    x = activations(2, K)
    second.bias = first.bias
    assert torch.equal(first(x), second(x))


def test_a_failed_move_leaves_the_layer_as_it_was() -> None:
    layer = layer_of(move=False)
    layer.weight.data[2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.to("cpu")
    assert layer.weight is layer._parameters["weight"]
    assert layer.weight.is_floating_point()


def test_the_receipt_counts_it() -> None:
    found = receipt(torch.nn.Sequential(layer_of(bias=False)), show=False)
    assert found.share == 1.0
    assert found.nbytes == N * K + 4 * N
    assert list(found.formats) == ["int8"]


def test_attributes_that_other_libraries_read() -> None:
    layer = Linear8bitLt(K, N, False, has_fp16_weights=False, threshold=THRESHOLD, index=7, device="meta")
    assert (layer.index, layer.state.threshold, layer.state.has_fp16_weights) == (7, THRESHOLD, False)
    assert (layer.in_features, layer.out_features, layer.bias) == (K, N, None)
    assert layer.weight.device.type == "meta"
    assert (layer.state.CB, layer.state.SCB, layer.weight.CB, layer.weight.SCB) == (None,) * 4
    assert isinstance(layer, torch.nn.Linear)
    assert isinstance(layer.state, MatmulLtState)


OLD_RELEASES = ("0.50, never called", "0.50, called", "row", "col_turing", "col_ampere", "col32")


def as_bitsandbytes_pickles(layer: Linear8bitLt, release: str) -> dict[str, Any]:
    """The ``__dict__`` of such a layer of bitsandbytes: a plain Parameter, codes and scales here or there."""
    codes, scales = layer.weight.data.clone(), layer.weight.SCB.clone()
    state = MatmulLtState()
    state.threshold, state.has_fp16_weights, state.use_pool = THRESHOLD, False, True
    weight = torch.nn.Parameter(codes, requires_grad=False)
    weight.has_fp16_weights, weight.CB, weight.SCB = False, None, None
    if release == "0.50, never called":
        weight.CB, weight.SCB = codes, scales
    elif release == "0.50, called":
        state.CB, state.SCB = codes, scales
    else:
        state.SCB, state.formatB = scales, release
        state.CxB = codes if release == "row" else stored_as(codes, release)
        weight.data = state.CxB
    pickled = dict(vars(layer), state=state)
    pickled["_parameters"] = {"weight": weight, "bias": layer.bias}
    return pickled


@pytest.mark.parametrize("release", OLD_RELEASES)
def test_a_layer_that_bitsandbytes_pickled_becomes_ours(release: str) -> None:
    layer, x = layer_of(), activations(3, K)
    expected = layer(x)
    old = Linear8bitLt.__new__(Linear8bitLt)
    old.__setstate__(as_bitsandbytes_pickles(layer, release))
    assert type(old.weight) is Int8Params
    assert old.state.threshold == THRESHOLD
    assert torch.equal(old.weight.data, layer.weight.data)
    for other in (old, copy.deepcopy(old), old.to("cpu")):
        assert torch.equal(other(x), expected)


def test_a_pickled_layer_without_scales_is_an_error() -> None:
    pickled = as_bitsandbytes_pickles(layer_of(), "0.50, called")
    pickled["state"].SCB = None
    with pytest.raises(CheckpointError, match="without its scales"):
        Linear8bitLt.__new__(Linear8bitLt).__setstate__(pickled)


def test_a_pickled_layer_with_a_weight_in_floats_trains() -> None:
    layer = layer_of(has_fp16_weights=True)
    state = MatmulLtState()
    pickled = dict(vars(layer), state=state)
    pickled["_parameters"] = {"weight": torch.nn.Parameter(layer.weight.data.clone()), "bias": layer.bias}
    old = Linear8bitLt.__new__(Linear8bitLt)
    old.__setstate__(pickled)
    assert old.weight.requires_grad
    old(activations(2, K)).sum().backward()
    assert old.weight.grad is not None


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_with_inductor(requires_grad: bool) -> None:
    layer, x = layer_of(), activations(3, K).requires_grad_(requires_grad)
    compiled = torch.compile(layer, fullgraph=True)
    out = compiled(x)
    assert torch.equal(out, layer(x))
    if requires_grad:
        (found,) = torch.autograd.grad(out.sum(), x)
        (expected,) = torch.autograd.grad(layer(x).sum(), x)
        assert torch.equal(found, expected)


def loaded(layer: Linear8bitLt) -> Linear8bitLt:
    fresh = layer_of(seed=7, move=False)
    fresh.load_state_dict(layer.state_dict())
    return fresh


def loaded_from_meta(layer: Linear8bitLt) -> Linear8bitLt:
    fresh = Linear8bitLt(K, N, has_fp16_weights=False, threshold=THRESHOLD, device="meta")
    fresh.load_state_dict(layer.state_dict(), assign=True)
    return fresh


def called(layer: Linear8bitLt) -> Linear8bitLt:
    layer(activations(5, K))
    return layer


EXPORTED = {
    "moved": lambda layer: layer, "called": called, "loaded": loaded, "loaded from meta": loaded_from_meta,
    "deepcopy": copy.deepcopy, "pickle": KEPT["pickle"], "weight.to": weight_moved_by_hand,
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_layer_has_its_scales_after_saving_and_loading(name: str) -> None:
    layer, x = EXPORTED[name](layer_of()), activations(5, K)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(torch.nn.Sequential(layer), (activations(3, K),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), layer(x))
    assert type(layer.weight) is Int8Params
    assert layer.weight.SCB is not None


def test_a_replaced_weight_is_exported_with_its_own_scales() -> None:
    layer, other, x = called(layer_of()), layer_of(seed=5), activations(3, K)
    layer.weight = other.weight
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_a_weight_put_among_the_parameters_is_exported_with_its_own_scales() -> None:
    layer, other, x = called(layer_of()), layer_of(seed=5), activations(3, K)
    layer._parameters["weight"] = other.weight  # accelerate's way
    assert torch.equal(torch.export.export(called(layer), (x,)).module()(x), layer(x))
