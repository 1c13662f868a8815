"""4-bit layers on a GPU: the short way of repeated calls, CUDA graphs, torch.compile, export, several GPUs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from halfbyte.autograd.low_rank_4bit import low_rank_matmul_4bit
from halfbyte.backends.reference import four_bit as reference
from halfbyte.functional import dequantize_4bit, kernel_scales
from halfbyte.nn import Linear4bit
from tests.support.listening import Listener
from tests.support.small_llama import TOKENS, adapted_llama, gradients

pytestmark = pytest.mark.gpu


def layer_of(
    dtype: torch.dtype = torch.bfloat16, *, nested: bool = True, bias: bool = True, n: int = 160, k: int = 256
) -> Linear4bit:
    torch.manual_seed(0)
    layer = Linear4bit(k, n, bias, dtype, nested, "nf4")
    if bias:
        layer.bias.data = layer.bias.data.to(dtype)
    return layer.to("cuda")


def dispatched(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """The product through torch's dispatcher."""
    with Listener():
        return layer(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_repeated_calls_give_the_dispatched_product(dtype: torch.dtype, nested: bool, bias: bool) -> None:
    layer = layer_of(dtype, nested=nested, bias=bias)
    with torch.no_grad():
        for shape in ((1, 1, 256), (8, 256), (3, 5, 256), (70, 256), (300, 256)):
            for _ in range(3):
                x = torch.randn(shape, device="cuda", dtype=dtype)
                torch.testing.assert_close(layer(x), dispatched(layer, x), rtol=0, atol=0)
    assert layer._repeated is not None


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_few_rows_of_a_16_bit_layer_are_repeated_directly(nested: bool, rows: int) -> None:
    layer = layer_of(nested=nested)
    x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        assert layer._repeated is not None
        assert layer._repeated.product(layer, x) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("rows", [8, 300, 3000])
def test_repeated_products_in_training_give_the_dispatched_gradients(
    dtype: torch.dtype, nested: bool, rows: int
) -> None:
    layer = layer_of(dtype, nested=nested)
    x = torch.randn(1, rows, 256, device="cuda", dtype=dtype, requires_grad=True)
    upstream = torch.randn(1, rows, 160, device="cuda", dtype=dtype)
    with Listener():
        expected = torch.autograd.grad(layer(x), (x, layer.bias), upstream)
    for _ in range(4):
        found = torch.autograd.grad(layer(x), (x, layer.bias), upstream)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [100, 256, 2000])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_products_of_usual_sizes_are_repeated_to_the_bit(rows: int, nested: bool) -> None:
    layer = layer_of(nested=nested, n=4096, k=4096)
    upstream = torch.randn(1, rows, 4096, device="cuda", dtype=torch.bfloat16)
    inputs = [torch.randn_like(upstream).requires_grad_() for _ in range(3)]
    for x in inputs:
        with Listener():
            product = layer(x)
            expected = [product, *torch.autograd.grad(product, (x, layer.bias), upstream)]
        for _ in range(3):
            product = layer(x)
            found = [product, *torch.autograd.grad(product, (x, layer.bias), upstream)]
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert layer._repeated is not None
    assert layer._repeated.product(layer, inputs[0]) is not None
    assert layer._repeated.gradient(upstream, layer.weight) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_rows_are_repeated_directly_forward_and_backward(dtype: torch.dtype) -> None:
    layer = layer_of(dtype, n=264)  # no multiple of 64: no product of the decoding kernel, forward or backward
    x = torch.randn(1, 5000, 256, device="cuda", dtype=dtype, requires_grad=True)
    upstream = torch.randn(1, 5000, 264, device="cuda", dtype=dtype)
    for _ in range(2):
        layer(x).backward(upstream)
    assert layer._repeated is not None
    assert layer._repeated.product(layer, x) is not None
    assert layer._repeated.gradient(upstream, layer.weight) is not None


@pytest.mark.parametrize("rows", [1, 300, 3000])
@pytest.mark.parametrize("dropout", [False, True])
def test_a_low_rank_product_beside_a_layer_is_near_the_exact_sum_with_its_gradients(rows: int, dropout: bool) -> None:
    layer = layer_of(bias=False)
    x, dropped = (torch.randn(2, rows, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    down, up = (torch.randn(size, device="cuda", dtype=torch.bfloat16) * 0.1 for size in ((16, 256), (160, 16)))
    upstream = torch.randn(2, rows, 160, device="cuda", dtype=torch.bfloat16)
    inputs = [tensor.requires_grad_() for tensor in ((x, dropped, down, up) if dropout else (x, down, up))]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    product = exact[0] @ weight.t() + 2.0 * (exact[-3] @ exact[-2].t()) @ exact[-1].t()
    expected = [product, *torch.autograd.grad(product, exact, upstream.double())]
    for _ in range(3):  # planned, prepared, repeated
        found = low_rank_matmul_4bit(x, layer, down, up, 2.0, dropped if dropout else None)
        for own, right in zip([found, *torch.autograd.grad(found, inputs, upstream)], expected, strict=True):
            assert (own.double() - right).norm() <= 0.006 * right.norm()


def test_a_repeated_call_on_misaligned_activations_is_right() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer(torch.randn(2, 256, device="cuda", dtype=torch.bfloat16))
        x = torch.randn(2 * 256 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(2, 256)
        torch.testing.assert_close(layer(x), layer(x.clone()), rtol=0, atol=0)


def test_a_moved_layer_computes_where_it_is() -> None:
    layer = layer_of()
    x = torch.randn(2, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        before = (layer(x), layer(x))[1]
        there_and_back = layer.to("cpu").to("cuda")
        torch.testing.assert_close(there_and_back(x), before, rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(layer)(x), before, rtol=0, atol=0)


def test_repeated_calls_are_captured_in_a_graph_and_follow_its_input() -> None:
    layer = layer_of()
    x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x), layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        x.copy_(torch.randn_like(x))
        out.fill_(math.nan)
        graph.replay()
        torch.testing.assert_close(out, layer(x), rtol=0, atol=0)


def test_repeated_calls_run_on_the_current_stream() -> None:
    layer = layer_of(n=4096, k=4096)
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.no_grad():
        want = (layer(x), layer(x))[1]
        later = torch.zeros_like(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            later.copy_(x)
            found = layer(later)
        side.synchronize()
    torch.testing.assert_close(found, want, rtol=0, atol=0)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_dequantizing_again_gives_the_same_values(nested: bool) -> None:
    layer = layer_of(nested=nested)
    state = layer.weight.quant_state
    first = dequantize_4bit(layer.weight.data, state)
    absmax, *scales = kernel_scales(state)
    want = reference.dequantize_4bit(layer.weight.data, absmax, 64, "nf4", [160, 256], state.dtype, *scales)
    for _ in range(2):
        again = dequantize_4bit(layer.weight.data, state)
        torch.testing.assert_close(again, first, rtol=0, atol=0)
    torch.testing.assert_close(first, want, rtol=0, atol=0)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_gradients_of_one_step_after_another_are_those_of_the_dequantized_weight(nested: bool) -> None:
    layer = layer_of(nested=nested, bias=False)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    for _ in range(3):
        x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(300, 160, device="cuda", dtype=torch.bfloat16)
        y = layer(x)
        y.backward(grad)
        for got, want in ((y, x.double() @ weight.double().t()), (x.grad, grad.double() @ weight.double())):
            assert got is not None
            assert ((got.double() - want).norm() / want.norm()).item() < 5e-3


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_training_step_is_one_graph(mode: str) -> None:
    layer = layer_of(bias=False)
    down = torch.nn.Linear(256, 8, bias=False, device="cuda", dtype=torch.bfloat16)
    up = torch.nn.Linear(8, 160, bias=False, device="cuda", dtype=torch.bfloat16)

    def model(x: Tensor) -> Tensor:
        return layer(x) + up(down(x))

    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    model(x).float().square().sum().backward()
    want = x.grad, down.weight.grad, up.weight.grad
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        x.grad = down.weight.grad = up.weight.grad = None
        torch.compiler.cudagraph_mark_step_begin()
        compiled(x).float().square().sum().backward()
    for got, expected in zip((x.grad, down.weight.grad, up.weight.grad), want, strict=True):
        assert got is not None
        assert ((got - expected).float().norm() / expected.float().norm()).item() < 2e-2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_models_compiled_training_step_has_the_eager_gradients(mode: str) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    model, tokens = adapted_llama("cuda", torch.bfloat16, layers=1), TOKENS.cuda()
    model(tokens, labels=tokens).loss.backward()
    want = gradients(model)
    assert want
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        model.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        compiled(tokens, labels=tokens).loss.backward()
    found = gradients(model)
    for name, grad in want.items():
        assert ((found[name] - grad).float().norm() / grad.float().norm()).item() < 5e-2, name


def test_an_exported_layer_computes_the_same() -> None:
    layer = layer_of()
    x = torch.randn(2, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_on_another_gpu_than_the_current_one_computes_there() -> None:
    layer = layer_of().to("cuda:1")
    x = torch.randn(1, 256, device="cuda:1", dtype=torch.bfloat16)
    with torch.no_grad(), torch.cuda.device(0):
        first, second = layer(x), layer(x)
        with torch.cuda.device(1):
            torch.testing.assert_close(dispatched(layer, x), second, rtol=0, atol=0)
    assert second.device == x.device
    torch.testing.assert_close(first, second, rtol=0, atol=0)
