"""The short way through a layer of 4 or 8 bits: taken when a call like it was made before, left otherwise."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize
from torch import Tensor

from halfbyte.nn.repeated import SHAPES
from tests.support.listening import Listener
from tests.support.parametrized import double
from tests.support.repeating import LAYERS, K, N, X, misaligned, ordinary

pytestmark = pytest.mark.usefixtures("no_grad")
OPS = {"4 bits": "halfbyte.gemm_4bit.default", "8 bits": "halfbyte.int8_linear.default"}


@pytest.mark.parametrize("bias", [False, True])
def test_the_second_call_is_repeated(layer_of: Callable[..., Any], repeats: list[torch.Size], bias: bool) -> None:
    layer = layer_of(bias=bias)
    first = layer(X)
    assert repeats == []
    torch.testing.assert_close(layer(X), first, rtol=0, atol=0)
    assert repeats == [X.shape]


def test_every_shape_is_learned_by_itself(layer_of: Callable[..., Any], repeats: list[torch.Size]) -> None:
    layer = layer_of()
    shapes = [X, X[:1], X[None]]
    for x in shapes:
        layer(x)
    assert repeats == []
    for x in shapes:
        assert layer(x).shape == (*x.shape[:-1], N)
    assert repeats == [x.shape for x in shapes]


def test_activations_on_another_device_take_the_ordinary_way(
    layer_of: Callable[..., Any], repeats: list[torch.Size]
) -> None:
    layer = layer_of()
    layer(X)
    assert layer._repeated.product(layer, X.to("meta")) is None
    assert repeats == []


def test_misaligned_activations_take_the_ordinary_way(layer_of: Callable[..., Any], repeats: list[torch.Size]) -> None:
    layer = layer_of()
    expected = layer(X)
    torch.testing.assert_close(layer(misaligned(X)), expected)
    assert repeats == []


def test_the_backend_is_asked_once_for_each_shape(layer_of: Callable[..., Any], asked: list[Any]) -> None:
    layer = layer_of()
    layer(X), layer(misaligned(X)), layer(misaligned(X)), layer(X[:1])
    assert len(asked) == 2


KINDS: dict[str, Callable[[], Tensor]] = {
    "strided": lambda: X.t().contiguous().t(),
    "parameter": lambda: torch.nn.Parameter(X, requires_grad=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_another_kind_take_the_ordinary_way(
    layer_of: Callable[..., Any], repeats: list[torch.Size], kind: str
) -> None:
    layer = layer_of()
    expected = layer(X)
    torch.testing.assert_close(layer(KINDS[kind]()), expected)
    assert repeats == []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_learned_from_activations_of_another_kind(
    layer_of: Callable[..., Any], repeats: list[torch.Size], kind: str
) -> None:
    layer = layer_of()
    expected = layer(KINDS[kind]())
    torch.testing.assert_close(layer(X), expected)
    assert repeats == []


def test_another_dtype_is_learned_in_place_of_the_one_before(
    layer_of: Callable[..., Any], repeats: list[torch.Size]
) -> None:
    layer = layer_of(bias=False)
    layer.compute_dtype = None  # of 4 bits: the activations' own
    layer(X)
    for _ in range(2):
        assert layer(X.to(torch.bfloat16)).dtype == torch.bfloat16
    assert repeats == [X.shape]


def test_a_dtype_that_the_backend_does_not_repeat_leaves_others_alone(
    layer_of: Callable[..., Any], repeats: list[torch.Size]
) -> None:
    layer = layer_of(bias=False)
    layer.compute_dtype = None  # of 4 bits: the activations' own
    layer(X.half()), layer(X.half())
    assert repeats == []
    layer(X), layer(X)
    assert repeats == [X.shape]


@pytest.mark.usefixtures("repeats")
def test_what_the_backend_does_not_repeat_on_one_device_is_open_on_another(layer_of: Callable[..., Any]) -> None:
    layer, x = layer_of(bias=False), X.half()
    layer.compute_dtype = None  # of 4 bits: the activations' own
    layer(x)
    assert layer._repeated._refused(x)
    assert not layer._repeated._refused(x.to("meta"))


def replace_bias(layer: Any) -> None:
    layer.bias = torch.nn.Parameter(torch.ones(N))


def replace_bias_data(layer: Any) -> None:
    layer.bias.data = torch.ones(N)


def read_bias_in_another_dtype(layer: Any) -> None:
    layer.bias = torch.nn.Parameter(layer.bias.data.view(torch.float16)[:N])  # at the same address


def remove_bias(layer: Any) -> None:
    layer.bias = None


CHANGES = [replace_bias, replace_bias_data, read_bias_in_another_dtype, remove_bias]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_bias_is_added(
    layer_of: Callable[..., Any], repeats: list[torch.Size], change: Callable[[Any], None]
) -> None:
    layer = layer_of()
    layer.bias.data.fill_(3.0)
    before = layer(X), layer(X)
    change(layer)
    now = layer(X)
    torch.testing.assert_close(now, ordinary(layer, X), rtol=0, atol=0)
    assert not torch.allclose(now, before[1])
    assert len(repeats) == 1


def rebuild_weight(layer: Any) -> None:
    weight = layer.weight
    layer.weight = type(weight)(weight.data, requires_grad=False, **vars(weight))


def rebuild_state(layer: Any) -> None:
    layer.weight.quant_state = copy.copy(layer.weight.quant_state)


def rebuild_scales(layer: Any) -> None:
    layer.weight.SCB = layer.weight.SCB.detach()


RENEWALS = [
    ("4 bits", replace_bias), ("8 bits", replace_bias), ("4 bits", rebuild_weight), ("8 bits", rebuild_weight),
    ("4 bits", rebuild_state), ("8 bits", rebuild_scales),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change"), RENEWALS, ids=[f"{kind}-{change.__name__}" for kind, change in RENEWALS])
def test_other_tensors_are_repeated_from_the_second_call_on_whatever_memory_they_are_in(
    repeats: list[torch.Size], kind: str, change: Callable[[Any], None]
) -> None:
    layer = LAYERS[kind]()
    layer(X)
    change(layer)
    layer(X)
    assert repeats == []
    layer(X)
    assert repeats == [X.shape]


def test_a_bias_that_was_missing_is_added(layer_of: Callable[..., Any], repeats: list[torch.Size]) -> None:
    layer = layer_of(bias=False)
    without = layer(X), layer(X)
    layer.bias = torch.nn.Parameter(torch.ones(N))
    torch.testing.assert_close(layer(X), without[0] + 1)
    assert len(repeats) == 1


def test_a_bias_that_is_computed_in_each_call_takes_the_ordinary_way(
    layer_of: Callable[..., Any], repeats: list[torch.Size]
) -> None:
    layer = layer_of()
    single = layer(X), layer(X)
    double(layer, "bias")
    for _ in range(3):
        torch.testing.assert_close(layer(X), single[0] + layer.bias / 2)
    assert repeats == [X.shape]


def test_the_backend_is_not_asked_to_repeat_a_bias_that_is_computed(
    layer_of: Callable[..., Any], asked: list[Any]
) -> None:
    layer = layer_of()
    double(layer, "bias")
    layer(X), layer(X)
    assert asked == []


def test_a_bias_that_came_after_a_call_without_one_and_is_computed_is_added(
    layer_of: Callable[..., Any], repeats: list[torch.Size]
) -> None:
    layer = layer_of(bias=False)
    without = layer(X)
    layer.bias = torch.nn.Parameter(torch.ones(N))
    double(layer, "bias")
    torch.testing.assert_close(layer(X), without + 2)
    assert repeats == []


def test_a_weight_that_stands_behind_a_parametrization_is_multiplied(
    layer_of: Callable[..., Any], repeats: list[torch.Size]
) -> None:
    layer = layer_of()
    expected = layer(X), layer(X)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Identity())
    for _ in range(2):
        torch.testing.assert_close(layer(X), expected[0])
    assert repeats == [X.shape]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_listening_mode_hears_the_op(kind: str, repeats: list[torch.Size]) -> None:
    layer = LAYERS[kind]()
    layer(X)
    with Listener() as listener:
        layer(X)
    assert OPS[kind] in listener.heard
    assert repeats == []


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.usefixtures("repeats")
def test_copies_work_with_their_own_weight(layer_of: Callable[..., Any], copied: Callable[[Any], Any]) -> None:
    layer = layer_of()
    layer(X), layer(X)
    twin = copied(layer)
    torch.testing.assert_close(twin(X), layer(X), rtol=0, atol=0)
    twin.weight = layer_of(1).weight
    torch.testing.assert_close(twin(X), ordinary(twin, X), rtol=0, atol=0)
    torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=0, atol=0)


def test_the_number_of_remembered_shapes_is_bounded(layer_of: Callable[..., Any], repeats: list[torch.Size]) -> None:
    layer = layer_of()
    for rows in range(1, 3 * SHAPES):
        layer(torch.zeros(rows, K))
    assert 0 < len(layer._repeated._calls) <= SHAPES
    assert repeats == []


@pytest.mark.usefixtures("repeats")
def test_a_compiled_layer_is_one_graph_after_eager_calls(layer_of: Callable[..., Any]) -> None:
    layer = layer_of()
    layer(X), layer(X)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), layer(X), rtol=0, atol=0)


@pytest.mark.usefixtures("repeats")
def test_functional_calls_compute_with_what_they_are_given(layer_of: Callable[..., Any]) -> None:
    layer = layer_of()
    layer(X), layer(X)
    bias = torch.full((N,), 2.0)
    changed = torch.func.functional_call(layer, {"bias": bias}, (X,))
    torch.testing.assert_close(changed - bias, layer(X) - layer.bias)
