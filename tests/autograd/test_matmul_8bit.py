"""matmul: gradients, states with and without codes, and what each kind of weight means."""

import warnings

import pytest
import torch

import halfbyte
import halfbyte.functional as F
from halfbyte.autograd import GlobalOutlierPooler, MatMul8bitFp, MatMul8bitLt, MatmulLtState, matmul
from halfbyte.errors import QuantStateMissingError, UnsupportedError
from halfbyte.nn import Int8Params
from tests.support.hard_inputs import DTYPES
from tests.support.int8_inputs import THRESHOLD, activations, int8_weight
from tests.support.listening import Listener
from tests.support.tolerances import TOLERANCES, close, product

N, K = 24, 64


def frozen() -> MatmulLtState:
    state = MatmulLtState()
    state.CB, state.SCB = int8_weight(N, K)
    state.has_fp16_weights, state.threshold = False, THRESHOLD
    return state


def weight_of(state: MatmulLtState) -> torch.Tensor:
    return F.int8_vectorwise_dequant(state.CB, state.SCB)


@pytest.mark.parametrize("shape", [(5, K), (2, 3, K), (1, 2, 2, K)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frozen_weight_passes_its_dequantized_self_to_the_activations_gradient(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    state = frozen()
    A = activations(4 if len(shape) == 4 else 5 if len(shape) == 2 else 6, K, dtype).view(shape).requires_grad_()
    bias = torch.zeros(N, requires_grad=True)
    out = matmul(A, state.CB, state=state, bias=bias)
    grad = torch.randn_like(out)
    out.backward(grad)
    assert A.grad is not None
    assert bias.grad is not None
    weight = weight_of(state).double()
    expected = grad.double() @ weight
    close("gradient", A.grad, expected, product(dtype), grad.double().abs() @ weight.abs())
    flat = grad.double().view(-1, N)
    close("bias", bias.grad, flat.sum(0), TOLERANCES["product fp32"], flat.abs().sum(0))
    assert A.grad.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frozen_weight_has_second_derivatives(dtype: torch.dtype) -> None:
    state, A = frozen(), activations(3, K, dtype).requires_grad_()
    grad = torch.randn(3, N).to(dtype).requires_grad_()
    (first,) = torch.autograd.grad(matmul(A, state.CB, state=state), A, grad, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), grad)
    weight = weight_of(state).double()
    assert second.dtype == dtype
    close("second", second, weight.sum(1).expand(3, N), product(dtype), weight.abs().sum(1).expand(3, N))


def test_a_given_gradient_that_learns_takes_the_op_in_a_plain_backward_pass() -> None:
    state, A = frozen(), activations(3, K).requires_grad_()
    out = matmul(A, state.CB, state=state)
    with Listener() as listener:
        out.backward(torch.ones_like(out).requires_grad_())
    assert "halfbyte.int8_linear_dgrad.default" in listener.heard


def test_gradients_of_an_fp32_bias_beside_16_bit_activations_are_summed_in_fp32() -> None:
    state, bias = frozen(), torch.zeros(N, requires_grad=True)
    matmul(torch.zeros(257, K, dtype=torch.bfloat16), state.CB, state=state, bias=bias).sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((N,), 257.0))  # in bf16: 256


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_in_floats_is_trained_as_in_an_unquantized_layer(
    dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    A = activations(6, K, dtype).view(2, 3, K)
    B = torch.randn(N, K).to(weight_dtype).requires_grad_()
    out = matmul(A, B, threshold=THRESHOLD)
    grad = torch.randn_like(out)
    out.backward(grad)
    flat, rows = grad.double().view(-1, N), A.double().view(-1, K)
    assert B.grad is not None
    assert B.grad.dtype == weight_dtype
    tolerance = max(product(dtype), product(weight_dtype), key=lambda row: row.relative)
    close("weight", B.grad, flat.t() @ rows, tolerance, flat.t().abs() @ rows.abs())


def test_outliers_meet_the_float_weight_itself() -> None:
    A, B = torch.zeros(1, K), torch.randn(N, K)
    A[0, 3] = 8.0
    assert torch.equal(matmul(A, B, threshold=THRESHOLD), A @ B.t())
    assert not torch.equal(matmul(A, B), A @ B.t())


def test_a_float_weight_is_quantized_again_after_each_change() -> None:
    A, B, state = activations(2, K, outliers=False), torch.randn(N, K), MatmulLtState()
    state.is_training = False
    before = matmul(A, B, state=state)
    with torch.no_grad():
        B.mul_(2)
    assert torch.equal(matmul(A, B, state=state), before * 2)


def test_a_float_weight_is_quantized_once_where_the_state_says_so() -> None:
    A, B, state = activations(2, K), torch.randn(N, K), MatmulLtState()
    state.has_fp16_weights = False
    before = matmul(A, B, state=state)
    assert state.CB is not None
    assert torch.equal(matmul(A, torch.zeros(N, K), state=state), before)
    state.reset_grads()
    assert state.CB is None
    assert not matmul(A, torch.zeros(N, K), state=state).any()


def test_a_parameter_brings_its_own_codes_before_those_of_the_state() -> None:
    A, other = activations(2, K), frozen()
    weight = Int8Params(torch.randn(N, K), requires_grad=False).to("cpu")
    own = MatmulLtState()
    own.has_fp16_weights, own.CB, own.SCB, own.threshold = False, weight.CB, weight.SCB, THRESHOLD
    assert torch.equal(matmul(A, weight, state=other), matmul(A, own.CB, state=own))


def test_codes_without_scales_are_an_error() -> None:
    state = MatmulLtState()
    state.has_fp16_weights = False
    with pytest.raises(QuantStateMissingError, match=r"int8 codes of shape \(24, 64\) without their scales"):
        matmul(activations(1, K), int8_weight(N, K)[0], state=state)


def test_slices_of_a_weight_with_a_plain_state_as_serving_engines_use_it() -> None:
    state, A = frozen(), activations(3, K)
    whole = matmul(A.unsqueeze(0), state.CB, state=state)
    part = MatmulLtState()
    part.CB, part.SCB, part.threshold = state.CB[8:], state.SCB[8:], THRESHOLD
    part.has_fp16_weights, part.is_training, part.use_pool = False, False, False
    assert torch.equal(matmul(A.unsqueeze(0), part.CB, state=part), whole[..., 8:])
    del part.CB
    assert part.CB is None


def test_out_is_filled_and_returned() -> None:
    state, A, out = frozen(), activations(3, K), torch.empty(3, N)
    assert matmul(A, state.CB, out=out, state=state) is out
    assert torch.equal(out, matmul(A, state.CB, state=state))


@pytest.mark.parametrize("function", [MatMul8bitLt, MatMul8bitFp])
def test_out_is_filled_where_gradients_are_wanted_too(function: type[torch.autograd.Function]) -> None:
    state, A, out = frozen(), activations(3, K), torch.full((3, N), float("nan"))
    bias = torch.zeros(N, requires_grad=True)
    function.apply(A, state.CB, out, bias, state)
    assert torch.equal(out, function.apply(A, state.CB, None, bias, state))


def test_the_function_can_be_applied_by_itself() -> None:
    state, A = frozen(), activations(3, K).requires_grad_()
    assert torch.equal(MatMul8bitLt.apply(A, state.CB, None, None, state), matmul(A, state.CB, state=state))


@pytest.mark.parametrize("shape", [(0, K), (2, 0, K)])
def test_an_empty_activation_has_an_empty_product_and_gradient(shape: tuple[int, ...]) -> None:
    state, A = frozen(), torch.zeros(shape, requires_grad=True)
    out = matmul(A, state.CB, state=state)
    assert out.shape == (*shape[:-1], N)
    out.sum().backward()
    assert A.grad is not None
    assert A.grad.shape == shape


@pytest.mark.parametrize("name", ["CxB", "CxBt", "formatB", "_tile_indices"])
def test_fields_that_are_gone_read_as_none_with_a_warning_and_can_be_set(name: str) -> None:
    state = MatmulLtState()
    with pytest.warns(FutureWarning, match=name):
        assert getattr(state, name) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setattr(state, name, None)
    with pytest.raises(AttributeError, match="nothing"):
        _ = state.nothing


def test_the_package_exports_them() -> None:
    assert halfbyte.matmul is matmul
    assert halfbyte.MatmulLtState is MatmulLtState


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_float_function_multiplies_with_the_dequantized_weight_and_has_the_same_gradients(
    dtype: torch.dtype,
) -> None:
    state = frozen()
    bias = torch.linspace(-1, 1, N, requires_grad=True)
    A = activations(5, K, dtype).requires_grad_()
    out = MatMul8bitFp.apply(A, state.CB, None, bias, state)
    weight = weight_of(state).double()
    terms = A.double().abs() @ weight.abs().t() + bias.double().abs()
    close("product", out, A.double() @ weight.t() + bias.double(), product(dtype), terms)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (A, bias), grad)
    expected = torch.autograd.grad(matmul(A, state.CB, state=state, bias=bias), (A, bias), grad)
    assert all(map(torch.equal, found, expected))


def test_the_float_function_trains_a_weight_in_floats() -> None:
    A, B = activations(5, K), torch.randn(N, K, requires_grad=True)
    out = MatMul8bitFp.apply(A, B, None, None, MatmulLtState())
    assert torch.equal(out, torch.nn.functional.linear(A, B))
    out.sum().backward()
    assert B.grad is not None
    assert torch.allclose(B.grad, A.sum(0).expand(N, K), rtol=1e-5, atol=1e-4)


def test_the_pool_of_outliers_is_one_for_the_process_and_of_one_width() -> None:
    pool = GlobalOutlierPooler.get_instance()
    pool.initialize()
    assert GlobalOutlierPooler.get_instance() is pool
    pool.add_outliers(torch.tensor([5, 1]), K)
    pool.add_outliers(torch.tensor([9]), 2 * K)
    pool.add_outliers(torch.tensor([1, 3]), K)
    found = pool.get_current_outlier_idx()
    assert (found.dtype, found.tolist()) == (torch.int64, [1, 3, 5])
    with pytest.raises(UnsupportedError, match="one pool a process"):
        GlobalOutlierPooler()
