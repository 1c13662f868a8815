"""The short way through a 4-bit layer: taken when the call is one that was made before, left when anything changed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from halfbyte.backends import registry
from halfbyte.backends.reference import four_bit as reference
from halfbyte.backends.registry import Backend, implements
from halfbyte.functional import dequantize_4bit
from halfbyte.nn import Linear4bit
from tests.support.listening import Listener


@pytest.fixture
def repeats() -> Iterator[list[torch.Size]]:
    """A backend that offers to repeat products with the weight as it was when asked; lists the repeated shapes."""
    seen: list[torch.Size] = []
    registry.register(Backend("repeating", frozenset({"cpu"}), 99, "halfbyte.backends.reference"))

    def prepare(x: Tensor, packed: Tensor, shape: Any, absmax: Tensor, *rest: Any) -> Callable[[Tensor], Tensor]:
        blocksize, kind, bias, *nested = rest
        weight = reference.dequantize_4bit(packed, absmax, blocksize, kind, shape, x.dtype, *nested)
        frozen = None if bias is None else bias.detach().clone()

        def call(x: Tensor) -> Tensor:
            seen.append(x.shape)
            return F.linear(x, weight, frozen)

        return call

    implements("repeating", "gemm_4bit", prepare=prepare)(reference.gemm_4bit)
    yield seen
    registry.unregister("repeating")


@pytest.fixture
def repeated_gradients(repeats: list[torch.Size]) -> list[torch.Size]:
    """The same backend offers to repeat gradients to the input as well; lists their shapes."""
    del repeats
    seen: list[torch.Size] = []

    def prepare(grad: Tensor, packed: Tensor, shape: Any, absmax: Tensor, *rest: Any) -> Callable[[Tensor], Tensor]:
        blocksize, kind, *nested = rest
        weight = reference.dequantize_4bit(packed, absmax, blocksize, kind, shape, grad.dtype, *nested)

        def call(grad: Tensor) -> Tensor:
            seen.append(grad.shape)
            return grad @ weight

        return call

    implements("repeating", "gemm_4bit_dgrad", prepare=prepare)(reference.gemm_4bit_dgrad)
    return seen


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def layer_of(seed: int = 0, *, nested: bool = True, bias: bool = True) -> Linear4bit:
    torch.manual_seed(seed)
    return Linear4bit(64, 32, bias, torch.float32, nested, "nf4").to("cpu")


def direct(layer: Linear4bit, x: Tensor) -> Tensor:
    """The product by the ordinary way: a mode that listens keeps layers from the short one."""
    with Listener():
        return layer(x)


X = torch.randn(3, 64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.usefixtures("no_grad")
def test_the_second_call_is_repeated(repeats: list[torch.Size], nested: bool) -> None:
    layer = layer_of(nested=nested)
    first = layer(X)
    assert repeats == []
    torch.testing.assert_close(layer(X), first)
    assert repeats == [X.shape]


@pytest.mark.usefixtures("no_grad")
def test_every_shape_is_learned_by_itself(repeats: list[torch.Size]) -> None:
    layer = layer_of()
    for x in (X, X[:1], X[None]):
        layer(x)
    assert repeats == []
    for x in (X, X[:1], X[None]):
        assert layer(x).shape == (*x.shape[:-1], 32)
    assert repeats == [X.shape, X[:1].shape, X[None].shape]


def replace_weight(layer: Linear4bit) -> None:
    layer.weight = layer_of(1).weight


def replace_data(layer: Linear4bit) -> None:
    layer.weight.data = layer_of(1).weight.data


def replace_state(layer: Linear4bit) -> None:
    layer.weight.quant_state = layer_of(1).weight.quant_state


def replace_absmax(layer: Linear4bit) -> None:
    state = layer.weight.quant_state
    state.absmax = torch.roll(state.absmax, 1)


def replace_offset(layer: Linear4bit) -> None:
    layer.weight.quant_state.offset = torch.tensor(1.5)


def replace_second_level(layer: Linear4bit) -> None:
    layer.weight.quant_state.state2.absmax = layer.weight.quant_state.state2.absmax * 2


def replace_data_of_the_second_level(layer: Linear4bit) -> None:
    second = layer.weight.quant_state.state2
    second.absmax.data = second.absmax.data * 2


def replace_data_of_the_codes_levels(layer: Linear4bit) -> None:
    second = layer.weight.quant_state.state2
    second.code.data = second.code.data * 2


def replace_data_of_the_offset(layer: Linear4bit) -> None:
    layer.weight.quant_state.offset.data = torch.tensor(1.5)


def replace_kind(layer: Linear4bit) -> None:
    layer.weight.quant_state.quant_type = "fp4"


def replace_bias(layer: Linear4bit) -> None:
    layer.bias = torch.nn.Parameter(torch.ones(32))


def replace_bias_data(layer: Linear4bit) -> None:
    layer.bias.data = torch.ones(32)


def remove_bias(layer: Linear4bit) -> None:
    layer.bias = None


def load(layer: Linear4bit) -> None:
    layer.load_state_dict(layer_of(1).state_dict())


def load_assigned(layer: Linear4bit) -> None:
    layer.load_state_dict(layer_of(1).state_dict(), assign=True)


CHANGES = [
    replace_weight, replace_data, replace_state, replace_absmax, replace_offset, replace_second_level,
    replace_data_of_the_second_level, replace_data_of_the_codes_levels, replace_data_of_the_offset, replace_kind,
    replace_bias, replace_bias_data, remove_bias, load, load_assigned,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.usefixtures("no_grad")
def test_a_layer_that_changed_computes_with_what_it_has_now(
    repeats: list[torch.Size], change: Callable[[Linear4bit], None]
) -> None:
    layer = layer_of()
    before = layer(X), layer(X)
    assert len(repeats) == 1
    change(layer)
    now = layer(X)
    torch.testing.assert_close(now, direct(layer, X), rtol=0, atol=0)
    assert not torch.allclose(now, before[1])
    assert len(repeats) == 1
    torch.testing.assert_close(layer(X), now)
    assert len(repeats) == 2


@pytest.mark.usefixtures("no_grad")
def test_scales_that_were_computed_for_one_call_are_not_repeated(repeats: list[torch.Size]) -> None:
    layer = layer_of()
    state = layer.weight.quant_state
    state.state2.blocksize = 64  # no kernel decodes that: scales are decoded before each call, and freed after it
    first = layer(X)
    torch.testing.assert_close(layer(X), first, rtol=0, atol=0)
    assert repeats == []


@pytest.mark.usefixtures("no_grad")
def test_another_compute_dtype_is_computed_in(repeats: list[torch.Size]) -> None:
    layer = layer_of()
    layer(X)
    layer.compute_dtype = torch.bfloat16
    torch.testing.assert_close(layer(X), direct(layer, X), rtol=0, atol=0)
    assert repeats == []


@pytest.mark.usefixtures("no_grad")
def test_strided_activations_take_the_ordinary_way(repeats: list[torch.Size]) -> None:
    layer = layer_of()
    layer(X)
    strided = X.t().contiguous().t()
    torch.testing.assert_close(layer(strided), direct(layer, strided))
    assert repeats == []


@pytest.mark.usefixtures("no_grad")
def test_activations_that_are_cast_first_are_repeated(repeats: list[torch.Size]) -> None:
    layer = layer_of(bias=False)
    layer.compute_dtype = torch.bfloat16
    first = layer(X)
    assert first.dtype == torch.float32
    torch.testing.assert_close(layer(X), first, rtol=0, atol=0)
    assert repeats == [X.shape]


@pytest.mark.usefixtures("no_grad")
def test_another_dtype_of_activations_takes_the_ordinary_way(repeats: list[torch.Size]) -> None:
    layer = layer_of(bias=False)
    layer.compute_dtype = None  # the activations' own
    layer(X.to(torch.bfloat16))
    assert layer(X.to(torch.float16)).dtype == torch.float16
    assert repeats == []


def gradients(layer: Linear4bit, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of the sum of the product's squares, to the input and the bias."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert x.grad is not None
    return x.grad, None if layer.bias is None else layer.bias.grad


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_that_wants_gradients_is_repeated_with_them(
    repeats: list[torch.Size], repeated_gradients: list[torch.Size], bias: bool
) -> None:
    layer = layer_of(bias=bias)
    first, second, third = (gradients(layer, X) for _ in range(3))
    assert repeats == [X.shape] * 2
    assert repeated_gradients == [torch.Size((3, 32))]  # the second pass was the first whose gradient was looked for
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(third, first)


@pytest.mark.usefixtures("repeats")
def test_strided_gradients_are_repeated(repeated_gradients: list[torch.Size]) -> None:
    layer, x = layer_of(bias=False), X.clone().requires_grad_()
    for _ in range(3):
        (found,) = torch.autograd.grad(layer(x).sum(), x)  # of a sum: one value, expanded
    torch.testing.assert_close(found, torch.ones(3, 32) @ reference_weight(layer))
    assert repeated_gradients == [torch.Size((3, 32))]


@pytest.mark.parametrize("change", [replace_weight, replace_data, replace_offset, replace_data_of_the_second_level])
@pytest.mark.usefixtures("repeats")
def test_gradients_are_those_of_the_weight_that_was_multiplied(
    repeated_gradients: list[torch.Size], change: Callable[[Linear4bit], None]
) -> None:
    layer, twin = layer_of(), layer_of()
    for _ in range(3):
        gradients(layer, X)
    assert len(repeated_gradients) == 1
    change(layer)
    change(twin)
    torch.testing.assert_close(gradients(layer, X), gradients(twin, X))
    assert len(repeated_gradients) == 1


@pytest.mark.usefixtures("repeats", "repeated_gradients")
def test_a_weight_that_was_replaced_before_the_backward_pass_is_still_the_one_multiplied() -> None:
    layer = layer_of()
    gradients(layer, X), gradients(layer, X)
    expected = gradients(layer, X)
    x = X.clone().requires_grad_()
    product = layer(x)
    replace_weight(layer)
    product.square().sum().backward()
    torch.testing.assert_close(x.grad, expected[0])


@pytest.mark.usefixtures("repeats", "repeated_gradients")
def test_a_checkpointed_product_saves_the_same_when_it_is_repeated() -> None:
    layer = layer_of(bias=False)
    expected = gradients(layer_of(bias=False), X)[0]
    for _ in range(3):
        x = X.clone().requires_grad_()
        # The first pass takes the ordinary way, its repetition in the backward pass the short one.
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        torch.testing.assert_close(x.grad, expected)


@pytest.mark.usefixtures("repeats", "repeated_gradients")
def test_repeated_products_have_second_derivatives() -> None:
    layer, x = layer_of(bias=False), X.clone().requires_grad_()
    for _ in range(3):
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    weight = reference_weight(layer)
    y = X @ weight.t()
    torch.testing.assert_close(second, (6 * y * (torch.ones_like(X) @ weight.t())) @ weight)


def reference_weight(layer: Linear4bit) -> Tensor:
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.usefixtures("no_grad")
def test_a_listening_mode_hears_the_op(repeats: list[torch.Size]) -> None:
    layer = layer_of()
    layer(X)
    torch.testing.assert_close(direct(layer, X), layer(X))
    assert len(repeats) == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.usefixtures("no_grad")
def test_copies_work_with_their_own_weight(repeats: list[torch.Size], copied: Callable[[Any], Any]) -> None:
    layer = layer_of()
    layer(X), layer(X)
    twin = copied(layer)
    torch.testing.assert_close(twin(X), layer(X))
    replace_weight(twin)
    torch.testing.assert_close(twin(X), direct(twin, X))
    torch.testing.assert_close(layer(X), direct(layer, X))


@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_whole_layer_is_saved_and_loaded() -> None:
    layer = layer_of()
    layer(X), layer(X)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(X), layer(X))


@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_replaced_weight_is_freed() -> None:
    layer = layer_of()
    layer(X), layer(X)
    old = weakref.ref(layer.weight), weakref.ref(layer.weight.quant_state)
    replace_weight(layer)
    layer.quant_state = layer.weight.quant_state
    gc.collect()
    assert [reference() for reference in old] == [None, None]


@pytest.mark.usefixtures("no_grad")
def test_the_number_of_remembered_shapes_is_bounded(repeats: list[torch.Size]) -> None:
    layer = layer_of()
    for rows in range(1, 100):
        layer(torch.zeros(rows, 64))
    assert layer._repeated is not None
    assert len(layer._repeated._calls) <= 32
    assert repeats == []


@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_compiled_layer_is_one_graph_after_eager_calls() -> None:
    layer = layer_of()
    layer(X), layer(X)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), layer(X))


@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_layer_is_exported_after_eager_calls() -> None:
    layer = layer_of()
    layer(X), layer(X)
    program = torch.export.export(layer, (X,))
    assert any("gemm_4bit" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(X), layer(X))


@pytest.mark.usefixtures("no_grad", "repeats")
def test_functional_calls_compute_with_the_weights_they_are_given() -> None:
    layer = layer_of()
    layer(X), layer(X)
    bias = torch.full((32,), 2.0)
    changed = torch.func.functional_call(layer, {"bias": bias}, (X,))
    torch.testing.assert_close(changed - bias, layer(X) - layer.bias)
