"""matmul_4bit: product and gradients with packed codes in every form that callers pass."""

import pytest
import torch

import halfbyte.functional as F
from halfbyte.autograd import matmul_4bit
from halfbyte.errors import ArgumentError, QuantStateMissingError
from tests.support.hard_inputs import DTYPES, weights
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
