"""The short way through an 8-bit layer: taken when the call is one that was made before, left when anything changed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from halfbyte.backends import registry
from halfbyte.backends.reference import int8 as reference
from halfbyte.backends.registry import Backend, implements
from halfbyte.nn import Int8Params, Linear8bitLt
from tests.support.int8_inputs import THRESHOLD, activations
from tests.support.listening import Listener

N, K = 32, 64
X = activations(3, K)


@pytest.fixture
def repeats() -> Iterator[list[torch.Size]]:
    """A backend that offers to repeat products with the weight as it was when asked; lists the repeated shapes."""
    seen: list[torch.Size] = []
    registry.register(Backend("repeating", frozenset({"cpu"}), 99, "halfbyte.backends.reference"))

    def prepare(
        x: Tensor, CB: Tensor, SCB: Tensor, threshold: float, bias: Tensor | None
    ) -> Callable[[Tensor], Tensor | None]:
        codes, scales = CB.clone(), SCB.clone()
        frozen = None if bias is None else bias.detach().clone()

        def call(x: Tensor) -> Tensor | None:
            if x.data_ptr() % 16:
                return None
            seen.append(x.shape)
            return reference.int8_linear(x, codes, scales, threshold, frozen)

        return call

    implements("repeating", "int8_linear", prepare=prepare)(reference.int8_linear)
    yield seen
    registry.unregister("repeating")


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def layer_of(seed: int = 0, *, bias: bool = True) -> Linear8bitLt:
    torch.manual_seed(seed)
    return Linear8bitLt(K, N, bias, has_fp16_weights=False, threshold=THRESHOLD).to("cpu")


def ordinary(layer: Linear8bitLt, x: Tensor) -> Tensor:
    """The product by the ordinary way: a mode that listens keeps layers from the short one."""
    with Listener():
        return layer(x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("no_grad")
def test_the_second_call_is_repeated(repeats: list[torch.Size], bias: bool) -> None:
    layer = layer_of(bias=bias)
    first = layer(X)
    assert repeats == []
    assert torch.equal(layer(X), first)
    assert repeats == [X.shape]


@pytest.mark.usefixtures("no_grad")
def test_every_shape_is_learned_by_itself(repeats: list[torch.Size]) -> None:
    layer = layer_of()
    shapes = [X, X[:1], X[None]]
    for x in shapes:
        layer(x)
    assert repeats == []
    for x in shapes:
        assert layer(x).shape == (*x.shape[:-1], N)
    assert repeats == [x.shape for x in shapes]


def replace_weight(layer: Linear8bitLt) -> None:
    layer.weight = layer_of(1).weight


def replace_data(layer: Linear8bitLt) -> None:
    layer.weight.data = layer_of(1).weight.data


def narrow_in_place(layer: Linear8bitLt) -> None:
    layer.weight.data = layer.weight.data[: N // 2]
    layer.weight.SCB = layer.weight.SCB[: N // 2]
    layer.bias = None


def replace_scales(layer: Linear8bitLt) -> None:
    layer.weight.SCB = layer.weight.SCB * 2


def replace_data_of_the_scales(layer: Linear8bitLt) -> None:
    layer.weight.SCB.data = layer.weight.SCB.data * 2


def write_to_the_state(layer: Linear8bitLt) -> None:
    layer.state.CB = layer_of(1).weight.CB


def write_scales_to_the_state(layer: Linear8bitLt) -> None:
    layer.state.SCB = layer.state.SCB * 2


def replace_threshold(layer: Linear8bitLt) -> None:
    layer.state.threshold = 0.0


def replace_bias(layer: Linear8bitLt) -> None:
    layer.bias = torch.nn.Parameter(torch.ones(N))


def replace_bias_data(layer: Linear8bitLt) -> None:
    layer.bias.data = torch.ones(N)


def remove_bias(layer: Linear8bitLt) -> None:
    layer.bias = None


def load(layer: Linear8bitLt) -> None:
    layer.load_state_dict(layer_of(1).state_dict())


def merge(layer: Linear8bitLt) -> None:
    layer.weight = Int8Params(torch.randn(N, K), requires_grad=False).to("cpu")
    layer.state.reset_grads()


CHANGES = [
    replace_weight, replace_data, narrow_in_place, replace_scales, replace_data_of_the_scales, write_to_the_state,
    write_scales_to_the_state, replace_threshold, replace_bias, replace_bias_data, remove_bias, load, merge,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.usefixtures("no_grad")
def test_a_layer_that_changed_computes_with_what_it_has_now(
    repeats: list[torch.Size], change: Callable[[Linear8bitLt], None]
) -> None:
    layer = layer_of()
    before = layer(X), layer(X)
    assert len(repeats) == 1
    change(layer)
    now = layer(X)
    assert torch.equal(now, ordinary(layer, X))
    assert now.shape != before[1].shape or not torch.allclose(now, before[1])
    assert len(repeats) == 1
    assert torch.equal(layer(X), now)
    assert len(repeats) == 2


@pytest.mark.usefixtures("no_grad")
def test_activations_of_another_kind_take_the_ordinary_way(repeats: list[torch.Size]) -> None:
    layer = layer_of()
    layer(X)
    strided = X.t().contiguous().t()
    off = torch.empty(X.numel() + 1)[1:].view_as(X).copy_(X)
    expected = ordinary(layer, X)
    for x in (strided, off, X.to(torch.bfloat16), torch.nn.Parameter(X, requires_grad=False)):
        torch.testing.assert_close(layer(x).float(), expected, rtol=2e-2, atol=2e-1)
    assert repeats == []


def gradients(layer: Linear8bitLt, x: Tensor, weight: Tensor) -> list[Tensor]:
    given = x.clone().requires_grad_()
    (layer(given) * weight).sum().backward()
    assert layer.bias.grad is not None
    found = [given.grad, layer.bias.grad]
    layer.bias.grad = None
    return found


def test_gradients_are_those_of_the_ordinary_way(repeats: list[torch.Size]) -> None:
    layer, weight = layer_of(), torch.randn(3, N)
    expected = gradients(layer, X, weight)
    assert repeats == []
    for found in (gradients(layer, X, weight), gradients(layer, X, weight)):
        assert all(map(torch.equal, found, expected))
    assert repeats == [X.shape, X.shape]


def test_a_bias_that_learns_is_enough_for_gradients(repeats: list[torch.Size]) -> None:
    layer = layer_of()
    for _ in range(2):
        layer.bias.grad = None
        layer(X).sum().backward()
        torch.testing.assert_close(layer.bias.grad, torch.full((N,), 3.0))
    assert repeats == [X.shape]


def test_misaligned_activations_with_gradients_take_the_ordinary_way(repeats: list[torch.Size]) -> None:
    layer, weight = layer_of(), torch.randn(3, N)
    expected = gradients(layer, X, weight)
    off = torch.empty(X.numel() + 1)[1:].view_as(X).copy_(X).requires_grad_()
    (layer(off) * weight).sum().backward()
    assert torch.equal(off.grad, expected[0])
    assert repeats == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_learn_alike(repeats: list[torch.Size], reentrant: bool) -> None:
    layer, weight = layer_of(), torch.randn(3, N)
    expected = gradients(layer, X, weight)
    x = X.clone().requires_grad_()
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    (out * weight).sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert len(repeats) == 2


@pytest.mark.usefixtures("repeats")
def test_second_derivatives_pass_through() -> None:
    layer = layer_of(bias=False)
    for _ in range(2):
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        weight = layer.weight.CB.float() * layer.weight.SCB[:, None] / 127
        torch.testing.assert_close(second, 2 * (weight.sum(1) @ weight).expand_as(X), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("no_grad")
def test_training_mode_still_shows_in_the_state(repeats: list[torch.Size]) -> None:
    layer = layer_of().train()
    layer(X)
    layer.eval()(X)
    assert repeats == [X.shape]
    assert layer.state.is_training is False


@pytest.mark.usefixtures("no_grad")
def test_a_listening_mode_hears_the_op(repeats: list[torch.Size]) -> None:
    layer = layer_of()
    layer(X)
    with Listener() as listener:
        layer(X)
    assert "halfbyte.int8_linear.default" in listener.heard
    assert repeats == []


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.usefixtures("no_grad", "repeats")
def test_copies_work_with_their_own_weight(copied: Callable[[Any], Any]) -> None:
    layer = layer_of()
    layer(X), layer(X)
    twin = copied(layer)
    assert torch.equal(twin(X), layer(X))
    twin.weight = layer_of(1).weight
    assert torch.equal(twin(X), ordinary(twin, X))
    assert torch.equal(layer(X), ordinary(layer, X))


@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_replaced_weight_is_freed() -> None:
    layer = layer_of()
    layer(X), layer(X)
    old = weakref.ref(layer.weight), weakref.ref(layer.weight.SCB)
    replace_weight(layer)
    gc.collect()
    assert [reference() for reference in old] == [None, None]


@pytest.mark.usefixtures("no_grad")
def test_the_number_of_remembered_shapes_is_bounded(repeats: list[torch.Size]) -> None:
    layer = layer_of()
    for rows in range(1, 100):
        layer(torch.zeros(rows, K))
    assert layer._repeated is not None
    assert len(layer._repeated._calls) <= 32
    assert repeats == []


@pytest.mark.usefixtures("no_grad", "repeats")
def test_a_compiled_layer_is_one_graph_after_eager_calls() -> None:
    layer = layer_of()
    layer(X), layer(X)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), layer(X))


@pytest.mark.usefixtures("no_grad", "repeats")
def test_functional_calls_compute_with_what_they_are_given() -> None:
    layer = layer_of()
    layer(X), layer(X)
    bias = torch.full((N,), 2.0)
    changed = torch.func.functional_call(layer, {"bias": bias}, (X,))
    torch.testing.assert_close(changed - bias, layer(X) - layer.bias)
