"""matmul_4bit: product and gradients with packed codes in every form that callers pass."""

import pytest
import torch

import halfbyte.functional as F
from halfbyte.autograd import matmul_4bit
from halfbyte.errors import ArgumentError, QuantStateMissingError
from tests.support.hard_inputs import DTYPES, weights
from tests.support.listening import Listener
from tests.support.tolerances import close, product


def packed(nested: bool = True, rows: int = 32, columns: int = 64) -> tuple[torch.Tensor, F.QuantState, torch.Tensor]:
    codes, state = F.quantize_4bit(weights(rows * columns).view(rows, columns), None, None, 64, nested, "nf4")
    return codes, state, F.dequantize_4bit(codes, state).double()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 0), (2, 3)])
def test_product_and_gradients_equal_those_of_the_dense_weight_in_float64(
    lead: tuple[int, ...], dtype: torch.dtype, nested: bool, with_bias: bool
) -> None:
    codes, state, W = packed(nested)
    A = torch.randn(*lead, 64, dtype=dtype, requires_grad=True)
    bias = torch.randn(32, dtype=dtype, requires_grad=True) if with_bias else None
    y = matmul_4bit(A, codes, state, bias=bias)
    A64 = A.detach().double().requires_grad_()
    bias64 = None if bias is None else bias.detach().double().requires_grad_()
    expected = torch.nn.functional.linear(A64, W, bias64)
    size = A64.detach().abs() @ W.abs().t() + (0 if bias64 is None else bias64.detach().abs())
    assert y.dtype == dtype
    close("y", y, expected, product(dtype), size)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    assert A.grad is not None
    close("dA", A.grad, A64.grad, product(dtype), grad.double().abs() @ W.abs())
    if bias is not None:
        assert bias.grad is not None
        close("dbias", bias.grad, bias64.grad, product(dtype), grad.double().abs().reshape(-1, 32).sum(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_has_second_derivatives(dtype: torch.dtype) -> None:
    codes, state, W = packed()
    A, grad = (torch.randn(3, n).to(dtype).requires_grad_() for n in (64, 32))
    (first,) = torch.autograd.grad(matmul_4bit(A, codes, state), A, grad, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), grad)
    assert second.dtype == dtype
    close("second", second, W.sum(1).expand(3, 32), product(dtype), W.abs().sum(1).expand(3, 32))


def test_a_given_gradient_that_learns_takes_the_op_in_a_plain_backward_pass() -> None:
    codes, state, _ = packed()
    y = matmul_4bit(torch.randn(3, 64, requires_grad=True), codes, state)
    with Listener() as listener:
        y.backward(torch.ones_like(y).requires_grad_())
    assert "halfbyte.gemm_4bit_dgrad.default" in listener.heard


def test_a_bias_is_cast_to_the_activations_dtype() -> None:
    codes, state, _ = packed()
    A, bias = torch.randn(3, 64).bfloat16(), torch.randn(32)
    assert torch.equal(matmul_4bit(A, codes, state, bias=bias), matmul_4bit(A, codes, state, bias=bias.bfloat16()))


def test_gradients_of_an_fp32_bias_beside_16_bit_activations_are_summed_in_fp32() -> None:
    codes, state, _ = packed()
    bias = torch.zeros(32, requires_grad=True)
    matmul_4bit(torch.zeros(257, 64, dtype=torch.bfloat16), codes, state, bias=bias).sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((32,), 257.0))  # in bf16: 256


def test_a_product_without_gradient_is_the_same() -> None:
    codes, state, _ = packed()
    A = torch.randn(3, 64)
    with torch.no_grad():
        plain = matmul_4bit(A, codes, state)
    assert plain.grad_fn is None
    assert torch.equal(matmul_4bit(A.requires_grad_(), codes, state), plain)


def test_a_transposed_view_of_the_codes_is_the_same_weight() -> None:
    codes, state, _ = packed()
    A = torch.randn(3, 64)
    assert torch.equal(matmul_4bit(A, codes.t(), state), matmul_4bit(A, codes, state))


def test_rows_of_codes_are_a_smaller_weight() -> None:
    # vLLM multiplies with slices of the packed codes of merged layers.
    codes, state, _ = packed(nested=False)
    _, half, _ = packed(nested=False, rows=16)
    half.absmax = state.absmax[16:]
    A = torch.randn(3, 64)
    rows = matmul_4bit(A, codes[16 * 64 // 2 :].t(), half)
    assert torch.equal(rows, matmul_4bit(A, codes, state)[:, 16:])


def test_out_is_filled_and_returned() -> None:
    codes, state, _ = packed()
    A, out = torch.randn(3, 64), torch.zeros(3, 32)
    assert matmul_4bit(A, codes, state, out=out) is out
    assert torch.equal(out, matmul_4bit(A, codes, state))


def test_out_is_filled_where_gradients_are_wanted_too() -> None:
    codes, state, _ = packed()
    A, bias, out = torch.randn(3, 64), torch.zeros(32, requires_grad=True), torch.zeros(3, 32)
    matmul_4bit(A, codes, state, out=out, bias=bias)
    assert torch.equal(out, matmul_4bit(A, codes, state))


@pytest.mark.filterwarnings("ignore:the weight was quantized with shape")
def test_a_weight_quantized_input_first_takes_16_bit_activations_and_a_bias() -> None:
    codes, state, W = packed()
    A, bias = torch.randn(3, 32).bfloat16(), torch.randn(64)
    y = matmul_4bit(A, codes, state, bias=bias)
    assert y.dtype == torch.bfloat16
    close("y", y, A.double() @ W + bias, product(torch.bfloat16), A.double().abs() @ W.abs() + bias.abs())


def test_a_weight_quantized_input_first_still_multiplies_with_a_warning() -> None:
    codes, state, W = packed()
    A = torch.randn(3, 32)
    with pytest.warns(DeprecationWarning, match=r"quantized with shape \(32, 64\), input features first"):
        y = matmul_4bit(A, codes, state)
    close("y", y, A.double() @ W, product(torch.float32), A.double().abs() @ W.abs())


def test_a_square_weight_is_output_first() -> None:
    codes, state, W = packed(rows=64)
    A = torch.randn(3, 64)
    y = matmul_4bit(A, codes, state)
    close("y", y, A.double() @ W.t(), product(torch.float32), A.double().abs() @ W.abs().t())


def test_no_state_is_refused_with_the_way_out() -> None:
    with pytest.raises(QuantStateMissingError, match=r"has no quant_state[^\n]*\nhint: move the layer"):
        matmul_4bit(torch.randn(1, 64), packed()[0], None)


def test_the_state_of_another_weight_is_refused() -> None:
    codes, _, _ = packed()
    _, other, _ = packed(rows=16)
    with pytest.raises(ArgumentError, match="holds 1024 bytes; expected 512"):
        matmul_4bit(torch.randn(1, 64), codes, other)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_that_look_like_nan_multiply_as_bytes(storage: torch.dtype) -> None:
    A = torch.ones(32, 64)
    codes, state = F.quantize_4bit(A, quant_type="nf4", quant_storage=storage)
    assert codes.isnan().all()
    x = torch.randn(2, 64)
    assert torch.allclose(matmul_4bit(x, codes, state), x @ A.t(), atol=1e-5)
