"""4-bit codes, scales and values of the CPU backend are the reference's, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import backends
from halfbyte.backends.cpu import four_bit as cpu
from halfbyte.backends.cpu.kernels.levels import Level
from halfbyte.backends.reference import four_bit as reference
from halfbyte.formats import BLOCKSIZES_4BIT, codebook, codebook_names
from tests.backends.cpu.nesting import nest
from tests.support.hard_inputs import DTYPES, HARD, LENGTHS, hard, weights

KINDS = codebook_names(4)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in every bit, whatever kind of NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    if actual.is_floating_point():
        assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


def check(A: torch.Tensor, blocksize: int, kind: str) -> None:
    packed, absmax = cpu.quantize_4bit(A, blocksize, kind, torch.uint8)
    expected, scales = reference.quantize_4bit(A, blocksize, kind, torch.uint8)
    same(absmax, scales)
    same(packed, expected)
    for dtype in DTYPES:
        arguments = (expected, scales, blocksize, kind, tuple(A.shape), dtype)
        same(cpu.dequantize_4bit(*arguments), reference.dequantize_4bit(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_length_agrees(level: Level, kind: str, numel: int, dtype: torch.dtype) -> None:
    check(weights(numel, dtype), 64, kind)


@pytest.mark.parametrize("blocksize", BLOCKSIZES_4BIT)
@pytest.mark.parametrize("kind", KINDS)
def test_every_blocksize_agrees(level: Level, kind: str, blocksize: int) -> None:
    check(weights(3 * blocksize + 31), blocksize, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("kind", KINDS)
def test_hard_values_agree(level: Level, kind: str, name: str, dtype: torch.dtype) -> None:
    check(hard(name, dtype), 32, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("kind", KINDS)
def test_infinity_and_nan_spoil_their_own_block_as_in_the_reference(
    level: Level, kind: str, value: float, dtype: torch.dtype
) -> None:
    A = weights(200, dtype)
    A[70] = value
    check(A, 64, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_on_and_beside_every_midpoint_agree(level: Level, kind: str, dtype: torch.dtype) -> None:
    middle = torch.from_numpy(codebook(kind).midpoints)
    near = torch.cat([middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0))])
    A = torch.cat([torch.tensor([1.0]), near, -near]).to(dtype)
    check(A, 128, kind)


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(0, 2000),
    blocksize=st.sampled_from(BLOCKSIZES_4BIT),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_tensor_agrees(numel: int, blocksize: int, kind: str, dtype: torch.dtype, seed: int) -> None:
    check(weights(numel, dtype, seed), blocksize, kind)


@pytest.mark.parametrize("storage", [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32])
def test_storage_dtype_changes_the_view_not_the_bytes(level: Level, storage: torch.dtype) -> None:
    A = weights(512)
    packed, absmax = cpu.quantize_4bit(A, 64, "nf4", storage)
    expected, _ = reference.quantize_4bit(A, 64, "nf4", torch.uint8)
    assert packed.dtype == storage
    assert packed.shape == (256 // storage.itemsize, 1)
    same(packed.view(torch.uint8).view(-1), expected.view(-1))
    same(
        cpu.dequantize_4bit(packed, absmax, 64, "nf4", (512,), torch.float32),
        reference.dequantize_4bit(expected, absmax, 64, "nf4", (512,), torch.float32),
    )


def test_strided_input_is_read_in_row_major_order(level: Level) -> None:
    A = weights(96 * 130).view(96, 130).t()[3:, ::2]
    check(A, 64, "nf4")


def test_misaligned_and_read_only_bytes_are_read_where_they_are(level: Level) -> None:
    A = weights(1024)
    packed, absmax = reference.quantize_4bit(A, 64, "nf4", torch.uint8)
    blob = bytes(3) + packed.numpy().tobytes() + bytes(1)
    view = torch.frombuffer(blob, dtype=torch.uint8)[3:-1]
    scales = torch.frombuffer(bytes(4) + absmax.numpy().tobytes(), dtype=torch.float32)[1:]
    for dtype in DTYPES:
        same(
            cpu.dequantize_4bit(view, scales, 64, "nf4", (1024,), dtype),
            reference.dequantize_4bit(packed, absmax, 64, "nf4", (1024,), dtype),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_absmax_is_decoded_inside_with_the_same_rounding(level: Level, dtype: torch.dtype) -> None:
    A = weights(64 * 700 + 33)
    packed, absmax = reference.quantize_4bit(A, 64, "nf4", torch.uint8)
    nested = nest(absmax)
    arguments = (packed, nested[0], 64, "nf4", (A.numel(),), dtype, *nested[1:])
    same(cpu.dequantize_4bit(*arguments), reference.dequantize_4bit(*arguments))


@pytest.mark.parametrize("contiguous", [True, False])
def test_out_is_filled_and_nothing_beside_it(level: Level, contiguous: bool) -> None:
    A = weights(40 * 65)
    packed, absmax = reference.quantize_4bit(A, 64, "nf4", torch.uint8)
    whole = torch.full((42, 65), 7.0) if contiguous else torch.full((65, 42), 7.0).t()
    cpu.dequantize_4bit_out(packed, absmax, 64, "nf4", (40, 65), torch.float32, out=whole[1:41])
    same(whole[1:41], reference.dequantize_4bit(packed, absmax, 64, "nf4", (40, 65), torch.float32))
    assert (whole[[0, 41]] == 7.0).all()


def test_any_number_of_threads_gives_the_same_bytes(level: Level, use_threads: Callable[[int], None]) -> None:
    A = weights(1 << 18)
    for count in (1, 2, 5):
        use_threads(count)
        check(A, 64, "nf4")


@pytest.mark.slow
def test_elements_beyond_two_to_the_31_are_found(level: Level) -> None:
    last = 64 * 40
    numel = 2**31 + last
    packed, absmax = reference.quantize_4bit(weights(last), 64, "nf4", torch.uint8)
    far = torch.zeros(numel // 2, dtype=torch.uint8)
    far[-last // 2 :] = packed.view(-1)
    scales = torch.zeros(numel // 64)
    scales[-last // 64 :] = absmax
    out = torch.empty(last)
    table = cpu.tables.lookup_of("nf4")
    cpu.decode(far, cpu.Scales(scales), 64, table, out, first=2**31, end=numel)
    same(out, reference.dequantize_4bit(packed, absmax, 64, "nf4", (last,), torch.float32))


def test_the_registry_gives_cpu_tensors_to_this_backend(level: Level) -> None:
    verdicts = {v.backend: v.reason for v in backends.explain("quantize_4bit", weights(64), 64, "nf4", torch.uint8)}
    assert verdicts["cpu"] is None
