"""The reference backend's 8-bit ops against the textbook."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte.functional as F
from tests.reference import textbook
from tests.support.hard_inputs import DTYPES, HARD, LENGTHS, hard, weights
from tests.support.tolerances import TOLERANCES, close, rounding

ops = torch.ops.halfbyte
MAPS = {"signed": F.create_dynamic_map(), "unsigned": F.create_dynamic_map(signed=False)}


def check_codes(A: torch.Tensor, signed: str, blocksize: int) -> None:
    code = MAPS[signed]
    codes, absmax = ops.quantize_blockwise(A, code, blocksize)
    assert codes.shape == A.shape
    assert codes.dtype == torch.uint8
    flat = A.reshape(-1).double().numpy()
    truth = textbook.nearest(flat, blocksize, code.double().numpy())
    np.testing.assert_array_equal(absmax.double().numpy(), truth.absmax)
    chosen = codes.reshape(-1).long().numpy()
    huge = np.repeat(truth.absmax > 2.0**126, blocksize)[: A.numel()]
    slack = np.where(huge, TOLERANCES["nearest slack, huge"].relative, TOLERANCES["nearest slack"].relative)
    assert (truth.excess(chosen) <= slack).all()
    values = ops.dequantize_blockwise(codes, absmax, code, blocksize, A.dtype)
    expected = torch.from_numpy(textbook.decode(chosen, truth.absmax, blocksize, code.double().numpy()))
    spacing = torch.finfo(A.dtype).smallest_normal
    close("values", values.reshape(-1), expected, rounding(A.dtype), expected.abs().clamp(min=spacing))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", LENGTHS)
@pytest.mark.parametrize("signed", MAPS)
def test_every_length_quantizes_to_the_nearest_levels(signed: str, numel: int, dtype: torch.dtype) -> None:
    check_codes(weights(numel, dtype), signed, 256)


@pytest.mark.parametrize("blocksize", [1, 7, 64, 100, 256, 4096, 10_000])
def test_every_blocksize_quantizes_to_the_nearest_levels(blocksize: int) -> None:
    check_codes(weights(1037), "signed", blocksize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_hard_values_quantize_to_the_nearest_levels(name: str, dtype: torch.dtype) -> None:
    check_codes(hard(name, dtype), "signed", 64)


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=100),
    blocksize=st.integers(1, 120),
)
def test_any_finite_floats_quantize_to_the_nearest_levels(values: list[float], blocksize: int) -> None:
    check_codes(torch.tensor(values, dtype=torch.float32), "signed", blocksize)


def test_exact_midpoints_take_the_lower_level() -> None:
    code = MAPS["signed"]
    midpoints = (code[:-1] + code[1:]) * 0.5
    codes, _ = ops.quantize_blockwise(torch.cat([torch.ones(1), midpoints]), code, 4096)
    assert codes.tolist() == [255, *range(255)]


def test_a_non_contiguous_tensor_is_read_in_row_major_order() -> None:
    A = weights(35 * 4).view(35, 4)
    codes, absmax = ops.quantize_blockwise(A.t(), MAPS["signed"], 16)
    again, scales = ops.quantize_blockwise(A.t().contiguous(), MAPS["signed"], 16)
    assert codes.shape == (4, 35)
    assert torch.equal(codes, again)
    assert torch.equal(absmax, scales)
    values = ops.dequantize_blockwise(codes.t().contiguous().t(), absmax, MAPS["signed"], 16, torch.float32)
    assert torch.equal(values, ops.dequantize_blockwise(again, absmax, MAPS["signed"], 16, torch.float32))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_shows_in_its_own_absmax_only(value: float) -> None:
    A = weights(200)
    A[70] = value
    codes, absmax = ops.quantize_blockwise(A, MAPS["signed"], 64)
    assert not absmax[1].isfinite()
    assert absmax[[0, 2, 3]].isfinite().all()
    assert codes[70] == 0


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5, 7), (65, 2)])
def test_out_forms_fill_what_they_are_given(shape: tuple[int, ...]) -> None:
    A, code = weights(math.prod(shape)).view(shape), MAPS["signed"]
    codes, absmax = ops.quantize_blockwise(A, code, 32)
    out, scales = torch.full(shape, 77, dtype=torch.uint8), torch.full(absmax.shape, math.nan)
    assert ops.quantize_blockwise.out(A, code, 32, out=out, absmax=scales) is None
    assert torch.equal(out, codes)
    assert torch.equal(scales, absmax)
    for dtype in DTYPES:
        values = torch.full(shape, math.nan, dtype=dtype)
        assert ops.dequantize_blockwise.out(codes, absmax, code, 32, dtype, out=values) is None
        assert torch.equal(values, ops.dequantize_blockwise(codes, absmax, code, 32, dtype))
