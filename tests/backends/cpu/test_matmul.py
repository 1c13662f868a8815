"""Products of the CPU backend and their gradients against float64 on the reference's dequantized weight."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import backends  # noqa: F401  (binds the ops)
from halfbyte.backends.cpu import fused, sliced
from halfbyte.backends.cpu import matmul as cpu
from halfbyte.backends.cpu.kernels.levels import Level
from halfbyte.backends.reference import four_bit as reference
from halfbyte.formats import BLOCKSIZES_4BIT, codebook_names
from tests.backends.cpu.nesting import nest
from tests.support.hard_inputs import DTYPES, weights
from tests.support.tolerances import close, product

KINDS = codebook_names(4)
BATCHES = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 70)


def check(
    batch: int, n: int, k: int, dtype: torch.dtype, blocksize: int = 64, kind: str = "nf4", double: bool = False
) -> None:
    """gemm_4bit with and without bias, and its gradient."""
    packed, absmax = reference.quantize_4bit(weights(n * k), blocksize, kind, torch.uint8)
    scales = (absmax, None, None, None) if not double else nest(absmax)
    named = (scales[0], blocksize, kind)
    weight = reference.dequantize_4bit(packed, *named, (n, k), torch.float32, *scales[1:]).double()
    x, bias, grad = torch.randn(batch, k).to(dtype), torch.randn(n).to(dtype), torch.randn(batch, n).to(dtype)
    for added in (None, bias):
        out = cpu.gemm_4bit(x, packed, (n, k), *named, added, *scales[1:])
        exact = x.double() @ weight.T + (0 if added is None else added.double())
        size = x.double().abs() @ weight.T.abs() + (0 if added is None else added.double().abs())
        assert out.dtype == dtype
        close("product", out, exact, product(dtype), size)
    back = cpu.gemm_4bit_dgrad(grad, packed, (n, k), *named, *scales[1:])
    assert back.dtype == dtype
    close("gradient", back, grad.double() @ weight, product(dtype), grad.double().abs() @ weight.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_every_batch_size(level: Level, batch: int, dtype: torch.dtype) -> None:
    check(batch, 50, 192, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES_4BIT)
def test_every_blocksize_plain_and_nested_also_where_blocks_cross_rows(
    level: Level, blocksize: int, double: bool, dtype: torch.dtype
) -> None:
    check(2, 37, 320, dtype, blocksize, double=double)
    check(1, 37, 320, dtype, blocksize, double=double)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_codebook(level: Level, kind: str, dtype: torch.dtype) -> None:
    check(1, 33, 256, dtype, kind=kind)
    check(3, 33, 256, dtype, kind=kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 31, 33, 63, 65, 96, 129])
def test_rows_that_are_no_whole_chunks(level: Level, k: int, dtype: torch.dtype) -> None:
    for batch in (1, 4):
        check(batch, 7, k, dtype, 32)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.one_of(st.integers(1, 200), st.integers(1, 12).map(lambda chunks: 64 * chunks)),
    blocksize=st.sampled_from(BLOCKSIZES_4BIT),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    double=st.booleans(),
)
def test_any_shape(batch: int, n: int, k: int, blocksize: int, kind: str, dtype: torch.dtype, double: bool) -> None:
    check(batch, n, k, dtype, blocksize, kind, double)


@pytest.mark.parametrize("batch", [1, 5, 40])
def test_a_weight_of_several_slices_panels_and_pieces(
    level: Level, batch: int, monkeypatch: pytest.MonkeyPatch, use_threads: Callable[[int], None]
) -> None:
    monkeypatch.setattr(sliced, "SLICE_BYTES", 40_000)
    monkeypatch.setattr(fused, "PANEL_BYTES", 5_000)
    for count in (1, 3):
        use_threads(count)
        for dtype in (torch.float32, torch.bfloat16):
            check(batch, 600, 704, dtype)


@pytest.mark.parametrize(
    ("batch_shape", "n", "k"),
    [((0,), 8, 64), ((2, 0), 8, 64), ((3,), 0, 64), ((3,), 8, 0), ((2, 3), 8, 64), ((), 8, 64)],
)
def test_any_number_of_leading_dimensions_and_nothing_at_all(
    level: Level, batch_shape: tuple[int, ...], n: int, k: int
) -> None:
    packed, absmax = reference.quantize_4bit(weights(n * k), 64, "nf4", torch.uint8)
    x, bias = torch.randn(*batch_shape, k), torch.randn(n)
    arguments = (packed, (n, k), absmax, 64, "nf4")
    for added in (None, bias):
        out = torch.ops.halfbyte.gemm_4bit(x, *arguments, added)
        torch.testing.assert_close(out, reference.gemm_4bit(x, *arguments, added))
    grad = torch.randn(*batch_shape, n)
    torch.testing.assert_close(
        torch.ops.halfbyte.gemm_4bit_dgrad(grad, *arguments), reference.gemm_4bit_dgrad(grad, *arguments)
    )


@pytest.mark.parametrize("batch", [1, 6, 50])
def test_strided_and_repeated_activations(level: Level, batch: int) -> None:
    packed, absmax = reference.quantize_4bit(weights(24 * 128), 64, "nf4", torch.uint8)
    arguments = (packed, (24, 128), absmax, 64, "nf4")
    columns, row = torch.randn(128, batch).t(), torch.randn(128).expand(batch, 128)
    for x in (columns, torch.randn(batch, 256)[:, 128:], torch.randn(2 * batch, 128)[::2], row):
        torch.testing.assert_close(cpu.gemm_4bit(x, *arguments), reference.gemm_4bit(x, *arguments))


def test_misaligned_read_only_bytes(level: Level) -> None:
    packed, absmax = reference.quantize_4bit(weights(24 * 128), 64, "nf4", torch.uint8)
    view = torch.frombuffer(bytearray(bytes(3) + packed.numpy().tobytes()), dtype=torch.uint8)[3:].view(-1, 1)
    for batch in (1, 4, 50):
        x = torch.randn(batch, 128)
        expected = reference.gemm_4bit(x, packed, (24, 128), absmax, 64, "nf4")
        torch.testing.assert_close(cpu.gemm_4bit(x, view, (24, 128), absmax, 64, "nf4"), expected)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_storage_dtype_does_not_matter(level: Level, storage: torch.dtype) -> None:
    packed, absmax = reference.quantize_4bit(weights(24 * 128), 64, "nf4", torch.uint8)
    x = torch.randn(2, 128)
    same = cpu.gemm_4bit(x, packed.view(-1).view(storage).view(-1, 1), (24, 128), absmax, 64, "nf4")
    assert torch.equal(same, cpu.gemm_4bit(x, packed, (24, 128), absmax, 64, "nf4"))


@pytest.mark.parametrize("batch", [1, 4, 50])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_spoiled_block_makes_its_row_nan_and_no_other(level: Level, value: float, batch: int) -> None:
    weight = weights(20 * 128).view(20, 128)
    weight[7, 90] = value
    packed, absmax = reference.quantize_4bit(weight, 64, "nf4", torch.uint8)
    for dtype in DTYPES:
        out = cpu.gemm_4bit(torch.randn(batch, 128).to(dtype), packed, (20, 128), absmax, 64, "nf4")
        assert out[:, 7].isnan().all()
        assert out[:, [*range(7), *range(8, 20)]].isfinite().all()


@pytest.mark.parametrize("batch", [1, 4])
def test_infinite_activations_give_what_a_dequantized_weight_gives(level: Level, batch: int) -> None:
    packed, absmax = reference.quantize_4bit(weights(20 * 128), 64, "nf4", torch.uint8)
    x = torch.randn(batch, 128)
    x[:, 5] = float("inf")
    weight = reference.dequantize_4bit(packed, absmax, 64, "nf4", (20, 128), torch.float32)
    out = cpu.gemm_4bit(x, packed, (20, 128), absmax, 64, "nf4")
    torch.testing.assert_close(out, x @ weight.T, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_gemv_takes_its_levels_from_a_tensor(level: Level, batch: int, dtype: torch.dtype) -> None:
    packed, absmax = reference.quantize_4bit(weights(30 * 128), 64, "nf4", torch.uint8)
    x, code = torch.randn(batch, 128).to(dtype), torch.linspace(-1, 1, 16)
    out = cpu.gemv_4bit(x, packed, (30, 128), absmax, code, 64)
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1).int()
    weight = (code[codes] * absmax.repeat_interleave(64)).view(30, 128).double()
    close("product", out, x.double() @ weight.T, product(dtype), x.double().abs() @ weight.T.abs())
    into = torch.empty(batch, 30, dtype=dtype)
    torch.ops.halfbyte.gemv_4bit.out(x, packed, (30, 128), absmax, code, 64, out=into)
    assert torch.equal(into, out)


def test_a_product_leaves_activations_weight_and_scales_as_they_were(level: Level) -> None:
    packed, absmax = reference.quantize_4bit(weights(30 * 128), 64, "nf4", torch.uint8)
    for batch in (1, 4, 40):
        x = torch.randn(batch, 128)
        before = [tensor.clone() for tensor in (x, packed, absmax)]
        cpu.gemm_4bit(x, packed, (30, 128), absmax, 64, "nf4")
        cpu.gemm_4bit_dgrad(torch.randn(batch, 30), packed, (30, 128), absmax, 64, "nf4")
        assert all(torch.equal(a, b) for a, b in zip(before, (x, packed, absmax), strict=True))


def test_a_product_of_an_activation_that_requires_grad_does_not_raise(level: Level) -> None:
    packed, absmax = reference.quantize_4bit(weights(30 * 128), 64, "nf4", torch.uint8)
    for batch in (1, 40):
        x = torch.randn(batch, 128, requires_grad=True)
        assert torch.ops.halfbyte.gemm_4bit(x, packed, (30, 128), absmax, 64, "nf4").shape == (batch, 30)


def test_levels_are_those_of_the_codebook_at_every_lane(level: Level) -> None:
    """One-hot activations read single weights: every lane of a chunk finds its own element."""
    for kind in KINDS:
        packed, absmax = reference.quantize_4bit(weights(3 * 128), 32, kind, torch.uint8)
        weight = reference.dequantize_4bit(packed, absmax, 32, kind, (3, 128), torch.float32)
        found = torch.cat([cpu.gemm_4bit(x[None], packed, (3, 128), absmax, 32, kind) for x in torch.eye(128)])
        assert torch.equal(found.T, weight)
