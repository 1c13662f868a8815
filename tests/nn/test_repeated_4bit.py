"""The short way through a 4-bit layer: left when its weight, its scales or its dtype changed."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch

from halfbyte.errors import ArgumentError, QuantStateMissingError
from halfbyte.nn import Linear4bit
from halfbyte.quant_state import QuantState
from tests.support.changing_4bit import CHANGES, replace_weight
from tests.support.repeating import K, N, X, linear_4bit, ordinary


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.usefixtures("no_grad")
def test_plain_and_nested_scales_are_repeated(repeats: list[torch.Size], nested: bool) -> None:
    layer = linear_4bit(nested=nested)
    first = layer(X)
    assert repeats == []
    torch.testing.assert_close(layer(X), first)
    assert repeats == [X.shape]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.usefixtures("no_grad")
def test_a_layer_that_changed_computes_with_what_it_has_now(
    repeats: list[torch.Size], change: Callable[[Linear4bit], None]
) -> None:
    layer = linear_4bit()
    before = layer(X), layer(X)
    assert len(repeats) == 1
    change(layer)
    now = layer(X)
    torch.testing.assert_close(now, ordinary(layer, X), rtol=0, atol=0)
    assert not torch.allclose(now, before[1])
    assert len(repeats) == 1
    torch.testing.assert_close(layer(X), now)
    assert len(repeats) == 2


@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_state_that_is_gone_is_missed_as_in_the_ordinary_way() -> None:
    layer = linear_4bit()
    layer(X), layer(X)
    layer.weight.quant_state = layer.quant_state = None
    with pytest.raises(QuantStateMissingError, match="before its weight was quantized"):
        layer(X)


MISFITS: dict[str, Callable[[QuantState], None]] = {
    "shape": lambda state: setattr(state, "shape", torch.Size((N // 2, K))),
    "blocksize": lambda state: setattr(state, "blocksize", 32),
    "nested": lambda state: setattr(state, "nested", False),
    "second level": lambda state: setattr(state, "state2", None),
    "its blocksize": lambda state: setattr(state.state2, "blocksize", 16),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_state_that_does_not_fit_any_more_is_refused_as_in_the_ordinary_way(misfit: str) -> None:
    layer = linear_4bit()
    layer(X), layer(X)
    MISFITS[misfit](layer.weight.quant_state)
    with pytest.raises(ArgumentError):
        layer(X)


@pytest.mark.usefixtures("no_grad")
def test_scales_that_were_computed_for_one_call_are_not_repeated(repeats: list[torch.Size]) -> None:
    layer = linear_4bit()
    state = layer.weight.quant_state
    state.state2.blocksize = 64  # no kernel decodes that: scales are decoded before each call, and freed after it
    first = layer(X)
    torch.testing.assert_close(layer(X), first, rtol=0, atol=0)
    assert repeats == []


@pytest.mark.usefixtures("no_grad")
def test_another_compute_dtype_is_computed_in(repeats: list[torch.Size]) -> None:
    layer = linear_4bit()
    layer(X)
    layer.compute_dtype = torch.bfloat16
    torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=0, atol=0)
    assert repeats == []


@pytest.mark.usefixtures("no_grad")
def test_a_compute_dtype_that_means_the_same_is_repeated_from_the_second_call_on(repeats: list[torch.Size]) -> None:
    layer, x = linear_4bit(bias=False), X.to(torch.bfloat16)
    layer.compute_dtype = None  # the activations' own
    layer(x)
    layer.compute_dtype = torch.bfloat16
    layer(x)
    assert repeats == []
    layer(x)
    assert repeats == [X.shape]


@pytest.mark.usefixtures("no_grad")
def test_activations_that_are_cast_first_are_repeated(repeats: list[torch.Size]) -> None:
    layer = linear_4bit(bias=False)
    layer.compute_dtype = torch.bfloat16
    first = layer(X)
    assert first.dtype == torch.float32
    torch.testing.assert_close(layer(X), first, rtol=0, atol=0)
    assert repeats == [X.shape]


@pytest.mark.usefixtures("no_grad")
def test_another_dtype_of_activations_takes_the_ordinary_way(repeats: list[torch.Size]) -> None:
    layer = linear_4bit(bias=False)
    layer.compute_dtype = None  # the activations' own
    layer(X.to(torch.bfloat16))
    assert layer(X.to(torch.float16)).dtype == torch.float16
    assert repeats == []


@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_whole_layer_is_saved_and_loaded() -> None:
    layer = linear_4bit()
    layer(X), layer(X)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(X), layer(X))


@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_replaced_weight_is_freed() -> None:
    layer = linear_4bit()
    layer(X), layer(X)
    old = weakref.ref(layer.weight), weakref.ref(layer.weight.quant_state)
    replace_weight(layer)
    layer.quant_state = layer.weight.quant_state
    gc.collect()
    assert [reference() for reference in old] == [None, None]


@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_layer_is_exported_after_eager_calls() -> None:
    layer = linear_4bit()
    layer(X), layer(X)
    program = torch.export.export(layer, (X,))
    assert any("gemm_4bit" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(X), layer(X))
