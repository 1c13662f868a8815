"""LLM.int8() ops of every CPU-capable backend against the textbook."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import halfbyte.functional as F
from tests.reference import int8_textbook as textbook
from tests.support.hard_inputs import DTYPES, HARD, hard
from tests.support.int8_inputs import THRESHOLD, activations, int8_weight
from tests.support.tolerances import TOLERANCES, Tolerance, close, product, rounding

ops = torch.ops.halfbyte
SHAPES = [(1, 1, 1), (1, 64, 64), (1, 4096, 3), (2, 63, 5), (3, 65, 33), (4, 16, 17), (5, 300, 9), (9, 128, 1)]
SLACK = TOLERANCES["nearest slack"].relative * 127

many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
small = st.integers(1, 40)


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, only_backend: Callable[[str], None]) -> str:
    """Where ``cpu`` leaves a call to the reference, both run the reference."""
    if request.param == "reference":
        only_backend("reference")
    return request.param


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def check_codes(A: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, zeroed: torch.Tensor) -> None:
    assert (codes.dtype, absmax.dtype, absmax.shape) == (torch.int8, torch.float32, (A.shape[0],))
    assert not codes[zeroed].any()
    away = textbook.distance(f64(A), f64(absmax), codes.numpy().astype(np.int64))
    assert (away[~zeroed.numpy()] <= 0.5 + SLACK).all()


def check_output(out: torch.Tensor, expected: np.ndarray, A: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor) -> None:
    """Sums in fp32 of terms that may cancel, then one rounding."""
    terms = torch.from_numpy(np.abs(f64(A)) @ np.abs(f64(CB) * f64(SCB)[:, None] / 127).T)
    truth = torch.from_numpy(expected)
    allowed = terms * TOLERANCES["int8 product"].relative + truth.abs() * rounding(out.dtype).relative
    close("product", out, truth, Tolerance(1.0, "both rows of the table"), allowed + 1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_codes_and_outlier_columns_are_the_textbooks(
    shape: tuple[int, int, int], threshold: float, dtype: torch.dtype
) -> None:
    A = activations(shape[0], shape[1], dtype)
    codes, absmax, columns = F.int8_vectorwise_quant(A, threshold)
    limit = threshold or np.inf
    np.testing.assert_array_equal(f64(absmax), textbook.row_absmax(f64(A), limit))
    found = textbook.outlier_columns(f64(A), limit)
    assert columns is None if not threshold else columns.tolist() == found
    zeroed = A.float().abs() >= limit
    if shape[0] > 1:
        zeroed[:, found] = True
    check_codes(A, codes, absmax, zeroed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_hard_rows_get_the_textbooks_codes(name: str, dtype: torch.dtype) -> None:
    A = hard(name, dtype)[None].repeat(2, 1)
    codes, absmax, _ = F.int8_vectorwise_quant(A)
    np.testing.assert_array_equal(f64(absmax), textbook.row_absmax(f64(A)))
    check_codes(A, codes, absmax, torch.zeros_like(A, dtype=torch.bool))


@many
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=80))
def test_any_finite_row_gets_the_textbooks_codes(values: list[float]) -> None:
    A = torch.tensor([values], dtype=torch.float32)
    codes, absmax, _ = F.int8_vectorwise_quant(A)
    check_codes(A, codes, absmax, torch.zeros_like(A, dtype=torch.bool))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_equals_the_threshold_is_an_outlier(dtype: torch.dtype) -> None:
    A = torch.tensor([[6.0, -6.0, 1.0, 5.0]]).repeat(1, 5).to(dtype)
    codes, absmax, columns = F.int8_vectorwise_quant(A, THRESHOLD)
    assert absmax.tolist() == [5.0]
    assert columns is not None
    assert columns.tolist() == [k for k in range(20) if k % 4 < 2]
    assert codes[0, :4].tolist() == [0, 0, 25, 127]
    CB, SCB = torch.zeros(1, 20, dtype=torch.int8), torch.full((1,), 127.0)
    CB[0, :4] = torch.tensor([1, 2, 0, 1])
    assert ops.int8_linear(A, CB, SCB, THRESHOLD).item() == 6.0 - 12.0 + 5.0


def test_halves_round_to_even() -> None:
    A = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]]).repeat(2, 3)
    assert F.int8_vectorwise_quant(A)[0][1, :7].tolist() == [127, 0, 2, 2, 0, -2, 126]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
def test_a_row_that_is_not_finite_spoils_no_other_row(value: float, threshold: float) -> None:
    A = activations(4, 96, outliers=False)
    CB, SCB = int8_weight(7, 96)
    before = ops.int8_linear(A, CB, SCB, threshold)
    A[2, 70] = value
    after = ops.int8_linear(A, CB, SCB, threshold)
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    assert not after[2].isfinite().any()
    codes, absmax, _ = F.int8_vectorwise_quant(A)
    assert not codes[2].any()
    assert not absmax[2].isfinite()


@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
@pytest.mark.parametrize("batch", [1, 5, 20])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_activations_near_the_largest_values_of_bf16_give_finite_results(
    all_of_them: bool, batch: int, threshold: float
) -> None:
    A, (CB, SCB) = activations(batch, 512, torch.bfloat16, outliers=False), int8_weight(40, 512)
    A[0, 7] = 3e38
    if all_of_them:
        A, SCB = torch.full_like(A, 3e38) * A.sign(), SCB * 1e-3
    exact = A.double() @ (CB.double() * SCB.double()[:, None] / 127).t()
    out = ops.int8_linear(A, CB, SCB, threshold)
    assert ((out.double() - exact).abs() <= 0.02 * exact.abs().amax(1, keepdim=True)).all()  # false for NaN


def test_an_infinite_outlier_gives_the_infinity_that_the_weights_sign_says() -> None:
    A = activations(1, 64, outliers=False)
    A[0, 5] = float("inf")
    CB, SCB = int8_weight(6, 64)
    CB[:, 5] = torch.tensor([1, -1, 127, -127, 3, -3], dtype=torch.int8)
    expected = torch.tensor([[1.0, -1.0] * 3]) * float("inf")
    assert torch.equal(ops.int8_linear(A, CB, SCB, THRESHOLD), expected)


@pytest.mark.parametrize("columns", [1, 1024, 1025, 1041, 4097, 60000])
def test_sums_of_codes_are_exact_for_every_k(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    A = torch.randint(-128, 128, (3, columns), generator=generator).to(torch.int8)
    B = torch.randint(-128, 128, (2, columns), generator=generator).to(torch.int8)
    A[0], B[0], B[1] = 127, 127, -128
    A[1, 1:] = -128
    expected = torch.tensor(textbook.product(A.numpy(), B.numpy()))
    found = F.int8_linear_matmul(A, B)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), expected)
    out = torch.empty(3, 2, dtype=torch.int32)
    assert F.int8_linear_matmul(A, B, out=out) is out
    assert torch.equal(out.long(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_the_textbooks(shape: tuple[int, int, int], threshold: float, dtype: torch.dtype) -> None:
    batch, columns, rows = shape
    A, (CB, SCB) = activations(batch, columns, dtype, outliers=threshold > 0), int8_weight(rows, columns)
    bias = torch.linspace(-1, 1, rows)
    for given_bias in (None, bias, bias.to(dtype)):
        expected = textbook.linear(
            f64(A), f64(CB), f64(SCB), threshold, None if given_bias is None else f64(given_bias)
        )
        out = ops.int8_linear(A, CB, SCB, threshold, given_bias)
        assert (out.dtype, out.shape) == (dtype, (batch, rows))
        check_output(out, expected, A, CB, SCB)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_are_multiplied_with_the_unquantized_weight_where_it_is_given(dtype: torch.dtype) -> None:
    A, (CB, SCB) = activations(3, 130, dtype), int8_weight(11, 130)
    W = (CB * SCB[:, None] / 127 * 1.25).to(dtype)
    out = ops.int8_linear(A, CB, SCB, THRESHOLD, None, W)
    check_output(out, textbook.linear(f64(A), f64(CB), f64(SCB), THRESHOLD, None, f64(W)), A, CB * 1.25, SCB)
    assert not torch.equal(out, ops.int8_linear(A, CB, SCB, THRESHOLD))


@many
@given(batch=small, columns=st.integers(0, 90), rows=small, threshold=st.sampled_from([0.0, 2.0, THRESHOLD]))
def test_any_shape_is_the_textbooks(batch: int, columns: int, rows: int, threshold: float) -> None:
    A, (CB, SCB) = activations(batch, columns), int8_weight(rows, columns)
    out = ops.int8_linear(A[:6], CB, SCB, threshold)
    check_output(out, textbook.linear(f64(A[:6]), f64(CB), f64(SCB), threshold, None), A[:6], CB, SCB)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "3-D"])
def test_any_layout_is_read_element_by_element(layout: str, dtype: torch.dtype) -> None:
    CB, SCB = int8_weight(10, 48)
    A = {
        "transposed": activations(48, 6, dtype).t(),
        "strided": activations(12, 96, dtype)[::2, ::2],
        "expanded": activations(1, 48, dtype).expand(6, 48),
        "3-D": activations(6, 48, dtype).view(2, 3, 48),
    }[layout]
    plain = ops.int8_linear(A.contiguous(), CB, SCB, THRESHOLD)
    assert torch.equal(ops.int8_linear(A, CB, SCB, THRESHOLD), plain)
    assert torch.equal(ops.int8_linear(A, CB.t().contiguous().t(), SCB, THRESHOLD), plain)
    codes, absmax, _ = F.int8_vectorwise_quant(A.float())
    again, scales, _ = F.int8_vectorwise_quant(A.float().contiguous())
    assert torch.equal(codes, again)
    assert torch.equal(absmax, scales)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_an_empty_activation_gives_the_bias_or_nothing(shape: tuple[int, ...]) -> None:
    CB, SCB = int8_weight(5, shape[-1])
    bias = torch.arange(5.0)
    out = ops.int8_linear(torch.zeros(shape), CB, SCB, THRESHOLD, bias)
    assert out.shape == (*shape[:-1], 5)
    assert torch.equal(out, bias.expand_as(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_beyond_fp16_stay_finite_and_right(dtype: torch.dtype) -> None:
    A, (CB, SCB) = (activations(2, 64, outliers=False) * 1e6).to(dtype), int8_weight(9, 64)
    for threshold in (0.0, THRESHOLD):
        out = ops.int8_linear(A, CB, SCB, threshold)
        assert out.isfinite().all()
        assert out.abs().max() > 65504
        exact = f64(A) @ (f64(CB) * f64(SCB)[:, None] / 127).T
        assert np.abs(f64(out) - exact).max() < 0.02 * np.abs(exact).max()


def test_products_scale_by_exactly_one_over_127_squared() -> None:
    sums = torch.tensor([[127 * 127, -127 * 127 * 3]], dtype=torch.int32)
    out = ops.int8_mm_dequant(sums, torch.ones(1), torch.ones(2), torch.float32)
    close("scaled", out, torch.tensor([[1.0, -3.0]]), TOLERANCES["three roundings fp32"], out.abs())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_steps_make_up_the_mixed_product(dtype: torch.dtype) -> None:
    A, (CB, SCB) = activations(4, 100, dtype), int8_weight(12, 100)
    bias = torch.linspace(-2, 2, 12)
    CA, SCA, columns = F.int8_vectorwise_quant(A, THRESHOLD)
    out, apart = F.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, columns, bias)
    assert columns is not None
    assert torch.equal(apart, A[:, columns])
    weight = f64(CB) * f64(SCB)[:, None] / 127
    expected = (f64(CA) * f64(SCA)[:, None] / 127) @ weight.T + f64(apart) @ weight[:, columns].T + f64(bias)
    check_output(out, expected, A, CB, SCB)
    scaled = F.int8_scaled_mm(CA, CB, SCA, SCB, bias, dtype)
    sums = F.int8_linear_matmul(CA, CB)
    assert torch.equal(scaled, ops.int8_mm_dequant(sums, SCA, SCB, dtype, bias))
    alone, nothing = F.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, None, bias)
    assert torch.equal(alone, scaled)
    assert nothing is None


def test_a_single_rows_mixed_product_is_the_linear_op() -> None:
    A, (CB, SCB) = activations(1, 100), int8_weight(12, 100)
    CA, SCA, columns = F.int8_vectorwise_quant(A, THRESHOLD)
    out, _ = F.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, columns)
    check_output(ops.int8_linear(A, CB, SCB, THRESHOLD), f64(out), A, CB, SCB)


@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
def test_double_quant_is_quantization_by_row_and_by_column(threshold: float) -> None:
    A = activations(6, 40)
    by_row, by_column, rows, columns, outliers = F.int8_double_quant(A, threshold=threshold)
    codes, absmax, found = F.int8_vectorwise_quant(A, threshold)
    assert torch.equal(by_row, codes)
    assert torch.equal(rows, absmax)
    assert (outliers is None) == (found is None)
    np.testing.assert_array_equal(f64(columns), textbook.row_absmax(f64(A).T, threshold or np.inf))
    zeroed = A.abs() >= (threshold or np.inf)
    check_codes(A.t(), by_column.t(), columns, zeroed.t())


def test_dequantized_values_are_code_times_absmax_over_127() -> None:
    CB, SCB = int8_weight(5, 9)
    expected = CB.double() * SCB.double()[:, None] / 127
    found = F.int8_vectorwise_dequant(CB, SCB)
    assert found.dtype == torch.float32
    close("values", found, expected, TOLERANCES["three roundings fp32"], expected.abs())


@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, threshold: float, backend: str) -> None:
    A, (CB, SCB) = activations(23, 160, dtype), int8_weight(50, 160)
    together = ops.int8_linear(A, CB, SCB, threshold)
    for size in (1, 2, 3, 5, 8):
        apart = torch.cat([ops.int8_linear(piece, CB, SCB, threshold) for piece in A.split(size)])
        if backend == "cpu" or threshold == 0.0:
            assert torch.equal(apart, together)
        else:  # torch sums the outliers' products in an order that depends on the batch
            check_output(apart, f64(together), A, CB, SCB)


def test_more_columns_than_int32_sums_hold_are_still_exact() -> None:
    columns = 131072 + 4096
    A = torch.full((2, columns), 1.0)
    A[1, ::2] = -1.0
    B = torch.full((3, columns), 127, dtype=torch.int8)
    out = ops.int8_linear(A, B, torch.tensor([1.0, 2.0, 0.5]))
    close(
        "product", out[0], torch.tensor([1.0, 2.0, 0.5]).double() * columns, TOLERANCES["int8 product"], out[0].double()
    )
    assert not out[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 1500, 1100), (2, 5, 7)])
def test_the_gradient_is_the_product_with_the_dequantized_weight(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    CB, SCB = int8_weight(shape[2], shape[1])
    grad = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    found = ops.int8_linear_dgrad(grad.view(1, *grad.shape), CB, SCB)
    assert (found.dtype, found.shape) == (dtype, (1, shape[0], shape[1]))
    weight = F.int8_vectorwise_dequant(CB, SCB).double()
    close("gradient", found[0], grad.double() @ weight, product(dtype), grad.double().abs() @ weight.abs())
