"""8-bit codes, scales and values of the CPU backend are the reference's, bit for bit, for every map."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import backends
from halfbyte.backends.cpu import blockwise as cpu
from halfbyte.backends.cpu import tables
from halfbyte.backends.cpu.kernels.levels import Level
from halfbyte.backends.reference import blockwise as reference
from halfbyte.formats import dynamic, fp8, linear, normal
from tests.support.hard_inputs import DTYPES, HARD, LENGTHS, hard, weights

MAPS = {
    "dynamic": dynamic.dynamic_map(),
    "dynamic unsigned": dynamic.dynamic_map(signed=False),
    "dynamic of 5 bits": dynamic.dynamic_map(max_exponent_bits=4, total_bits=5),
    "linear": linear.linear_map(),
    "linear unsigned": linear.linear_map(signed=False),
    "fp8 e4m3": fp8.fp8_map(True, 4, 3),
    "fp8 e5m2": fp8.fp8_map(True, 5, 2),
    "normal": normal.normal_map(),
}


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def check(A: torch.Tensor, code: torch.Tensor, blocksize: int) -> None:
    assert not isinstance(tables.buckets(code.numpy().tobytes()), str)
    codes, absmax = cpu.quantize_blockwise(A, code, blocksize)
    expected, scales = reference.quantize_blockwise(A, code, blocksize)
    same(absmax, scales)
    same(codes, expected)
    for dtype in DTYPES:
        arguments = (expected, scales, code, blocksize, dtype)
        same(cpu.dequantize_blockwise(*arguments), reference.dequantize_blockwise(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", LENGTHS)
@pytest.mark.parametrize("name", MAPS)
def test_every_map_and_length_agrees(level: Level, name: str, numel: int, dtype: torch.dtype) -> None:
    check(weights(numel, dtype), torch.from_numpy(MAPS[name]), 256)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_hard_values_agree(level: Level, name: str, dtype: torch.dtype) -> None:
    check(hard(name, dtype), torch.from_numpy(MAPS["dynamic"]), 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_infinity_and_nan_spoil_their_own_block_as_in_the_reference(
    level: Level, value: float, dtype: torch.dtype
) -> None:
    A = weights(700, dtype)
    A[300] = value
    check(A, torch.from_numpy(MAPS["dynamic"]), 256)


@pytest.mark.parametrize("name", MAPS)
def test_values_on_and_beside_every_midpoint_agree(level: Level, name: str) -> None:
    code = torch.from_numpy(MAPS[name])
    middle = (code[:-1] + code[1:]) * 0.5
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    A = torch.cat([torch.tensor([1.0, -1.0]), middle, middle.nextafter(up), middle.nextafter(down), code])
    check(A, code, 2048)


@settings(max_examples=40, deadline=None)
@given(
    numel=st.integers(0, 3000),
    blocksize=st.sampled_from([32, 64, 96, 256, 2048, 4096]),
    name=st.sampled_from(sorted(MAPS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_tensor_agrees(numel: int, blocksize: int, name: str, dtype: torch.dtype, seed: int) -> None:
    check(weights(numel, dtype, seed), torch.from_numpy(MAPS[name]), blocksize)


@pytest.mark.parametrize("blocksize", [1, 7, 100])
def test_blocksizes_that_fill_no_registers_are_dequantized_too(level: Level, blocksize: int) -> None:
    code = torch.from_numpy(MAPS["dynamic"])
    codes, absmax = reference.quantize_blockwise(weights(333), code, blocksize)
    for dtype in DTYPES:
        arguments = (codes, absmax, code, blocksize, dtype)
        same(cpu.dequantize_blockwise(*arguments), reference.dequantize_blockwise(*arguments))


def _reason(code: torch.Tensor, blocksize: int) -> str | None:
    verdicts = backends.explain("quantize_blockwise", weights(64), code, blocksize)
    return next(v.reason for v in verdicts if v.backend == "cpu")


def test_a_blocksize_that_fills_no_registers_is_left_to_the_reference_with_a_reason() -> None:
    assert _reason(torch.from_numpy(MAPS["dynamic"]), 100) == "blocksize 100 is no multiple of 32"


def test_a_map_that_does_not_rise_is_left_to_the_reference_with_a_reason() -> None:
    code = torch.from_numpy(MAPS["dynamic"]).flip(0).contiguous()
    assert _reason(code, 256) == "the code map does not rise from value to value"


def test_a_map_with_values_too_close_is_left_to_the_reference_with_a_reason() -> None:
    code = torch.from_numpy(np.linspace(0.9, 0.9001, 256).astype(np.float32))
    assert _reason(code, 256) == "the code map has values too close together for one comparison each"


@pytest.mark.parametrize("contiguous", [True, False])
def test_out_is_filled_and_nothing_beside_it(level: Level, contiguous: bool) -> None:
    A, code = weights(40 * 65).view(40, 65), torch.from_numpy(MAPS["dynamic"])
    codes, absmax = reference.quantize_blockwise(A, code, 64)
    whole = torch.full((42, 65), 9, dtype=torch.uint8)
    whole = whole if contiguous else whole.t().contiguous().t()
    scales = torch.full((absmax.numel() + 2,), 7.0)
    cpu.quantize_blockwise_out(A, code, 64, out=whole[1:41], absmax=scales[1:-1])
    same(whole[1:41], codes)
    same(scales[1:-1], absmax)
    assert (whole[[0, 41]] == 9).all()
    assert (scales[[0, -1]] == 7.0).all()
    values = torch.full((42, 65), 7.0)
    values = values if contiguous else values.t().contiguous().t()
    cpu.dequantize_blockwise_out(codes, absmax, code, 64, torch.float32, out=values[1:41])
    same(values[1:41], reference.dequantize_blockwise(codes, absmax, code, 64, torch.float32))
    assert (values[[0, 41]] == 7.0).all()


def test_strided_input_is_read_in_row_major_order(level: Level) -> None:
    check(weights(96 * 130).view(96, 130).t()[3:, ::2], torch.from_numpy(MAPS["dynamic"]), 256)


def test_any_number_of_threads_gives_the_same_bytes(level: Level, use_threads: Callable[[int], None]) -> None:
    for count in (1, 2, 5):
        use_threads(count)
        check(weights(1 << 18), torch.from_numpy(MAPS["dynamic"]), 256)
