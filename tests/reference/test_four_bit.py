"""The reference backend's 4-bit ops against the textbook."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import backends  # noqa: F401  (binds the ops)
from halfbyte.formats import BLOCKSIZES_4BIT, codebook
from halfbyte.quant_state import QuantState
from tests.reference import textbook
from tests.support.hard_inputs import DTYPES, HARD, LENGTHS, hard, weights
from tests.support.tolerances import TOLERANCES, close, product, rounding

ops = torch.ops.halfbyte
LEVELS = {"nf4": textbook.NF4, "fp4": textbook.FP4}
SLACK = TOLERANCES["nearest slack"].relative


def check_codes(A: torch.Tensor, kind: str, blocksize: int) -> None:
    """Quantize and hold every code, scale and value against the definition."""
    packed, absmax = ops.quantize_4bit(A, blocksize, kind, torch.uint8)
    numel = A.numel()
    assert packed.shape == ((numel + 1) // 2, 1)
    assert absmax.shape == (-(-numel // blocksize),)
    assert absmax.dtype == torch.float32
    flat = A.reshape(-1).double().numpy()
    truth = textbook.nearest(flat, blocksize, LEVELS[kind])
    codes = textbook.unpack(packed.numpy().tobytes(), numel)
    np.testing.assert_array_equal(absmax.double().numpy(), truth.absmax)
    huge = np.repeat(truth.absmax > 2.0**126, blocksize)[:numel]
    slack = np.where(huge, TOLERANCES["nearest slack, huge"].relative, SLACK)
    assert (truth.excess(codes) <= slack).all()
    values = ops.dequantize_4bit(packed, absmax, blocksize, kind, list(A.shape), A.dtype)
    assert values.shape == A.shape
    assert values.dtype == A.dtype
    expected = textbook.decode(codes, truth.absmax, blocksize, LEVELS[kind])
    check_rounded(values.reshape(-1), torch.from_numpy(expected))


def check_rounded(values: torch.Tensor, expected: torch.Tensor) -> None:
    """One rounding of the exact product, subnormals included."""
    spacing = torch.finfo(values.dtype).smallest_normal
    close("values", values, expected, rounding(values.dtype), expected.abs().clamp(min=spacing))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", LENGTHS)
@pytest.mark.parametrize("kind", LEVELS)
def test_every_length_quantizes_to_the_nearest_levels(kind: str, numel: int, dtype: torch.dtype) -> None:
    check_codes(weights(numel, dtype), kind, 64)


@pytest.mark.parametrize("blocksize", BLOCKSIZES_4BIT)
@pytest.mark.parametrize("kind", LEVELS)
def test_every_blocksize_quantizes_to_the_nearest_levels(kind: str, blocksize: int) -> None:
    check_codes(weights(2 * blocksize + 31), kind, blocksize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("kind", LEVELS)
def test_hard_values_quantize_to_the_nearest_levels(kind: str, name: str, dtype: torch.dtype) -> None:
    check_codes(hard(name, dtype), kind, 32)


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=150),
    kind=st.sampled_from(sorted(LEVELS)),
    blocksize=st.sampled_from([32, 64]),
)
def test_any_finite_floats_quantize_to_the_nearest_levels(values: list[float], kind: str, blocksize: int) -> None:
    check_codes(torch.tensor(values, dtype=torch.float32), kind, blocksize)


@settings(max_examples=40)
@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=4), data=st.data())
def test_any_layout_is_read_in_row_major_order(shape: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    A = weights(math.prod(shape)).view(shape).permute(order)
    packed, absmax = ops.quantize_4bit(A, 32, "nf4", torch.uint8)
    again, scales = ops.quantize_4bit(A.contiguous(), 32, "nf4", torch.uint8)
    assert torch.equal(packed, again)
    assert torch.equal(absmax, scales)


@pytest.mark.parametrize("kind", LEVELS)
def test_a_strided_slice_is_read_element_by_element(kind: str) -> None:
    base = weights(65 * 6).view(65, 6)
    check_codes(base[::2, 1::3], kind, 32)
    check_codes(base.t(), kind, 32)


def test_exact_midpoints_take_the_lower_level_in_nf4() -> None:
    midpoints = torch.from_numpy(codebook("nf4").midpoints)
    packed, _ = ops.quantize_4bit(torch.cat([torch.ones(1), midpoints]), 32, "nf4", torch.uint8)
    assert textbook.unpack(packed.numpy().tobytes(), 16).tolist() == [15, *range(15)]
    above = torch.nextafter(midpoints, torch.tensor(2.0))
    packed, _ = ops.quantize_4bit(torch.cat([torch.ones(1), above]), 32, "nf4", torch.uint8)
    assert textbook.unpack(packed.numpy().tobytes(), 16).tolist() == [15, *range(1, 16)]


def test_exact_midpoints_take_the_lower_level_in_fp4() -> None:
    book = codebook("fp4")
    midpoints = torch.from_numpy(book.midpoints)
    packed, _ = ops.quantize_4bit(torch.cat([torch.ones(1), midpoints]), 32, "fp4", torch.uint8)
    assert textbook.unpack(packed.numpy().tobytes(), 8).tolist()[1:] == list(book.rank_to_code[:-1])
    packed, _ = ops.quantize_4bit(torch.cat([torch.ones(1), -midpoints]), 32, "fp4", torch.uint8)
    assert textbook.unpack(packed.numpy().tobytes(), 8).tolist()[1:] == [code | 8 for code in book.rank_to_code[1:]]


@pytest.mark.parametrize("kind", LEVELS)
def test_the_padding_nibble_of_an_odd_count_is_zero_code(kind: str) -> None:
    packed, _ = ops.quantize_4bit(torch.tensor([1.0, 0.0, 1.0]), 32, kind, torch.uint8)
    assert int(packed[-1]) & 15 == codebook(kind).zero_code


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LEVELS)
def test_negating_a_weight_negates_its_values_in_fp4_and_zero_stays_zero(kind: str, dtype: torch.dtype) -> None:
    A = weights(500, dtype)
    A[::7] = 0
    values = {
        sign: ops.dequantize_4bit(*ops.quantize_4bit(sign * A, 64, kind, torch.uint8), 64, kind, [500], dtype)
        for sign in (1, -1)
    }
    assert (values[1][::7] == 0).all()
    if kind == "fp4":
        assert torch.equal(values[1], -values[-1])


@pytest.mark.parametrize(("value", "absmax"), [(float("nan"), float("nan")), (float("inf"), float("inf"))])
@pytest.mark.parametrize("kind", LEVELS)
def test_a_value_that_is_not_finite_shows_in_its_own_absmax_only(kind: str, value: float, absmax: float) -> None:
    A = weights(200)
    A[70] = value
    packed, scales = ops.quantize_4bit(A, 64, kind, torch.uint8)
    clean = A.clone()
    clean[70] = 0.5
    others, _ = ops.quantize_4bit(clean, 64, kind, torch.uint8)
    assert torch.equal(scales[1].isnan(), torch.tensor(math.isnan(absmax)))
    assert torch.equal(scales[1].isinf(), torch.tensor(math.isinf(absmax)))
    assert scales[[0, 2, 3]].isfinite().all()
    outside = [*range(32), *range(64, 100)]
    assert torch.equal(packed[outside], others[outside])


@pytest.mark.parametrize(
    "storage", [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_storages_are_views_of_the_same_bytes(storage: torch.dtype) -> None:
    A = weights(512)
    packed, absmax = ops.quantize_4bit(A, 64, "nf4", storage)
    plain, _ = ops.quantize_4bit(A, 64, "nf4", torch.uint8)
    assert packed.shape == (256 // storage.itemsize, 1)
    assert torch.equal(packed.view(torch.uint8).flatten(), plain.flatten())
    assert torch.equal(
        ops.dequantize_4bit(packed, absmax, 64, "nf4", [512], torch.float32),
        ops.dequantize_4bit(plain, absmax, 64, "nf4", [512], torch.float32),
    )


def nested_state(A: torch.Tensor, kind: str, blocksize: int) -> tuple[torch.Tensor, QuantState]:
    from halfbyte.functional import quantize_4bit

    return quantize_4bit(A, blocksize=blocksize, quant_type=kind, compress_statistics=True)


@pytest.mark.parametrize("blocksize", [32, 256])
@pytest.mark.parametrize("kind", LEVELS)
def test_nested_scales_decode_as_defined(kind: str, blocksize: int) -> None:
    A = weights(257 * blocksize + 5)
    packed, state = nested_state(A, kind, blocksize)
    assert state.state2 is not None
    assert state.offset is not None
    plain = textbook.nearest(A.double().numpy(), blocksize, LEVELS[kind])
    second = textbook.nearest(plain.absmax - float(state.offset), 256, textbook.dynamic(signed=True))
    assert (second.excess(state.absmax.long().numpy()) <= TOLERANCES["nearest slack, nested"].relative).all()
    scales = textbook.decode(state.absmax.long().numpy(), second.absmax, 256, textbook.dynamic(signed=True))
    expected = textbook.decode(
        textbook.unpack(packed.numpy().tobytes(), A.numel()), scales + float(state.offset), blocksize, LEVELS[kind]
    )
    values = ops.dequantize_4bit(
        packed,
        state.state2.absmax,
        blocksize,
        kind,
        [A.numel()],
        torch.float32,
        state.absmax,
        state.state2.code,
        state.offset,
    )
    bound = torch.from_numpy(second.absmax).repeat_interleave(256 * blocksize)[: A.numel()] + state.offset
    close("values", values, torch.from_numpy(expected), TOLERANCES["nested scale"], bound)


@pytest.mark.parametrize("shape", [(0,), (1,), (63,), (3, 5, 7), (65, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_filled_with_the_same_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    packed, absmax = ops.quantize_4bit(weights(math.prod(shape)).view(shape), 32, "nf4", torch.uint8)
    out = torch.full(shape, float("nan"), dtype=dtype)
    assert ops.dequantize_4bit.out(packed, absmax, 32, "nf4", list(shape), dtype, out=out) is None
    assert torch.equal(out, ops.dequantize_4bit(packed, absmax, 32, "nf4", list(shape), dtype))


def test_out_may_have_any_layout() -> None:
    packed, absmax = ops.quantize_4bit(weights(60).view(6, 10), 32, "nf4", torch.uint8)
    out = torch.full((10, 6), float("nan")).t()
    ops.dequantize_4bit.out(packed, absmax, 32, "nf4", [6, 10], torch.float32, out=out)
    assert torch.equal(out, ops.dequantize_4bit(packed, absmax, 32, "nf4", [6, 10], torch.float32))


PRODUCTS = [(1, 64, 64), (3, 65, 33), (5, 31, 96), (2, 1, 63), (0, 64, 8), (7, 128, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "K", "N"), PRODUCTS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", LEVELS)
def test_gemm_and_its_gradient_are_products_with_the_dequantized_weight(
    kind: str, nested: bool, rows: int, K: int, N: int, dtype: torch.dtype
) -> None:
    from halfbyte.functional import dequantize_4bit, kernel_scales, quantize_4bit

    packed, state = quantize_4bit(weights(N * K).view(N, K), blocksize=32, quant_type=kind, compress_statistics=nested)
    W = dequantize_4bit(packed, state).double()
    absmax, *extra = kernel_scales(state)
    x, grad = torch.randn(rows, K, dtype=dtype), torch.randn(rows, N, dtype=dtype)
    bias = torch.randn(N, dtype=dtype)
    y = ops.gemm_4bit(x, packed, [N, K], absmax, 32, kind, bias, *extra)
    assert y.dtype == dtype
    assert y.shape == (rows, N)
    bound = x.double().abs() @ W.abs().t() + bias.double().abs()
    close("y", y, x.double() @ W.t() + bias.double(), product(dtype), bound)
    dx = ops.gemm_4bit_dgrad(grad, packed, [N, K], absmax, 32, kind, *extra)
    assert dx.shape == (rows, K)
    close("dx", dx, grad.double() @ W, product(dtype), grad.double().abs() @ W.abs())


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 0)])
def test_activations_may_have_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    packed, absmax = ops.quantize_4bit(weights(8 * 64).view(8, 64), 64, "nf4", torch.uint8)
    x = torch.randn(*lead, 64)
    y = ops.gemm_4bit(x, packed, [8, 64], absmax, 64, "nf4")
    assert y.shape == (*lead, 8)
    W = ops.dequantize_4bit(packed, absmax, 64, "nf4", [8, 64], torch.float32)
    close("y", y, x.double() @ W.double().t(), product(torch.float32), x.double().abs() @ W.double().abs().t())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemv_takes_its_levels_as_a_tensor(dtype: torch.dtype) -> None:
    packed, absmax = ops.quantize_4bit(weights(8 * 65).view(8, 65), 32, "nf4", torch.uint8)
    code = torch.linspace(-1, 2, 16)
    codes = textbook.unpack(packed.numpy().tobytes(), 8 * 65)
    W = torch.from_numpy(textbook.decode(codes, absmax.double().numpy(), 32, code.double().numpy())).view(8, 65)
    x = torch.randn(1, 65, dtype=dtype)
    y = ops.gemv_4bit(x, packed, [8, 65], absmax, code, 32)
    close("y", y, x.double() @ W.t(), product(dtype), x.double().abs() @ W.abs().t())
    out = torch.full((1, 8), float("nan"), dtype=dtype)
    ops.gemv_4bit.out(x, packed, [8, 65], absmax, code, 32, out=out)
    assert torch.equal(out, y)
