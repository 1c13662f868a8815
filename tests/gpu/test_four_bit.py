"""The Triton backend on a GPU against the reference and against float64, over the matrix of what it takes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.backends import registry
from halfbyte.backends.reference import blockwise as reference_8bit
from halfbyte.backends.reference import four_bit as reference
from halfbyte.backends.triton import tuning
from halfbyte.backends.triton.device import rounded_pairs_of, words_of
from halfbyte.errors import ArgumentError
from halfbyte.formats.codebook import codebook
from halfbyte.formats.dynamic import dynamic_map

pytestmark = pytest.mark.gpu

ops = torch.ops.halfbyte
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def scales_of(absmax: Tensor, nested: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    if not nested:
        return absmax, None, None, None
    code, offset = torch.from_numpy(dynamic_map()).cuda(), absmax.mean()
    absmax_8bit, second = reference_8bit.quantize_blockwise(absmax - offset, code, 256)
    return second, absmax_8bit, code, offset


def hard(numel: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(numel, device="cuda", dtype=dtype) * 0.1
    if numel > 1024:
        x[64:128] = 0.0
        x[128:192] = torch.randn(64, device="cuda").to(dtype) * 1e-38
        x[300] = math.nan
        x[700] = math.inf
    return x


def test_the_triton_backend_computes_here() -> None:
    (first, *_rest) = registry.explain("gemm_4bit", torch.zeros(1, device="cuda"))
    assert (first.backend, first.reason) == ("triton", None)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "af4", "int4"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_quantizing_gives_the_references_bytes(dtype: torch.dtype, quant_type: str, blocksize: int) -> None:
    for numel in (1, 65, 4097, 300001):
        x = hard(numel, dtype)
        packed, absmax = ops.quantize_4bit(x, blocksize, quant_type, torch.uint8)
        packed_ref, absmax_ref = reference.quantize_4bit(x, blocksize, quant_type, torch.uint8)
        assert torch.equal(packed, packed_ref)
        torch.testing.assert_close(absmax, absmax_ref, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_dequantizing_gives_the_references_values(dtype: torch.dtype, nested: bool, blocksize: int) -> None:
    for numel in (63, 4097, 300001):
        packed, absmax = reference.quantize_4bit(torch.randn(numel, device="cuda"), blocksize, "nf4", torch.uint8)
        first, *rest = scales_of(absmax, nested)
        want = reference.dequantize_4bit(packed, first, blocksize, "nf4", [numel], dtype, *rest)
        got = ops.dequantize_4bit(packed, first, blocksize, "nf4", [numel], dtype, *rest)
        assert torch.equal(got, want)
        out = torch.full_like(want, math.nan)
        ops.dequantize_4bit.out(packed, first, blocksize, "nf4", [numel], dtype, *rest, out=out)
        assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("blocksize", [7, 256, 4096])
def test_8_bit_blocks_get_the_references_codes_and_values(dtype: torch.dtype, signed: bool, blocksize: int) -> None:
    code = torch.from_numpy(dynamic_map(signed=signed)).cuda()
    for numel in (1, 257, 100003):
        x = hard(numel, dtype)
        codes, absmax = ops.quantize_blockwise(x, code, blocksize)
        codes_ref, absmax_ref = reference_8bit.quantize_blockwise(x, code, blocksize)
        assert torch.equal(codes, codes_ref)
        torch.testing.assert_close(absmax, absmax_ref, rtol=0, atol=0, equal_nan=True)
        got = ops.dequantize_blockwise(codes_ref, absmax_ref, code, blocksize, dtype)
        want = reference_8bit.dequantize_blockwise(codes_ref, absmax_ref, code, blocksize, dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("dtype", "blocksize", "nested", "quant_type"),
    [
        (torch.bfloat16, 64, False, "nf4"),
        (torch.bfloat16, 64, True, "nf4"),
        (torch.float16, 64, True, "fp4"),
        (torch.bfloat16, 32, False, "fp4"),
        (torch.float16, 32, True, "nf4"),
        (torch.bfloat16, 256, True, "nf4"),
        (torch.bfloat16, 4096, False, "nf4"),
        (torch.float32, 64, True, "nf4"),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(256, 1024), (130, 96), (150, 4128), (133, 65)], ids=str)
def test_products_err_no_more_than_a_16_bit_linear(
    shape: tuple[int, int], dtype: torch.dtype, blocksize: int, nested: bool, quant_type: str
) -> None:
    n, k = shape
    packed, absmax = reference.quantize_4bit(torch.randn(n, k, device="cuda"), blocksize, quant_type, torch.uint8)
    first, *rest = scales_of(absmax, nested)
    weight = reference.dequantize_4bit(packed, first, blocksize, quant_type, shape, torch.float32, *rest)
    for m in (1, 13, 40, 130):
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        bias = torch.randn(n, device="cuda", dtype=dtype) if m != 13 else None
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        usual = error(F.linear(x, weight.to(dtype), bias), exact)
        # A tenth more for the scatter of a few hundred outputs; fp32 sums in another order than cuBLAS.
        limit = max(1.1 * usual, 2e-6)
        got = ops.gemm_4bit(x, packed, shape, first, blocksize, quant_type, bias, *rest)
        assert error(got, exact) <= limit, (m, usual)
        grad = torch.randn(m, n, device="cuda", dtype=dtype)
        exact = grad.double() @ weight.double()
        limit = max(1.1 * error(grad @ weight.to(dtype), exact), 2e-6)
        assert error(ops.gemm_4bit_dgrad(grad, packed, shape, first, blocksize, quant_type, *rest), exact) <= limit


def layer(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    packed, absmax = ops.quantize_4bit(torch.randn(n, k, device="cuda") * 0.02, 64, "nf4", torch.uint8)
    weight = ops.dequantize_4bit(packed, absmax, 64, "nf4", [n, k], torch.bfloat16)
    return packed, absmax, weight


def test_any_leading_strides_and_empty_batches() -> None:
    packed, absmax, weight = layer(256, 1024)
    base = torch.randn(3, 5, 2048, device="cuda", dtype=torch.bfloat16)
    turned = torch.randn(1024, 5, device="cuda", dtype=torch.bfloat16).t()
    views = [base[..., :1024], base[..., 1:1025], base[:, ::2, :1024], base[0, 0, :1024], turned]
    for x in [*views, base.transpose(0, 1)[..., :1024], base[:0, :, :1024]]:
        got = ops.gemm_4bit(x, packed, [256, 1024], absmax, 64, "nf4")
        want = F.linear(x, weight)
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("m", [1, 100, 300])
def test_rows_may_be_one_row_repeated_or_far_apart(m: int) -> None:
    packed, absmax, weight = layer(4096, 4096)
    one, wide = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((1, 4096), (m, 8192)))
    for x in (one.expand(m, -1), wide[:, :4096]):
        got = ops.gemm_4bit(x, packed, [4096, 4096], absmax, 64, "nf4")
        torch.testing.assert_close(got, F.linear(x, weight), rtol=2e-2, atol=2e-2)
        grad = ops.gemm_4bit_dgrad(x, packed, [4096, 4096], absmax, 64, "nf4")
        torch.testing.assert_close(grad, x @ weight, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("m", "shape", "blocksize", "tile"),
    [
        (1, (4096, 4096), 64, tuning.Tile("register", 8, 16, 4, 4, 1, 1, 4)),
        (5, (1000, 2048), 128, tuning.Tile("register", 8, 16, 2, 8, 1, 1, 3)),  # a rest of rows
        (16, (3000, 4128), 32, tuning.Tile("register", 16, 16, 2, 4, 1, 1, 4)),  # a rest of columns, odd iterations
        (8, (4096, 2048), 64, tuning.Tile("register", 8, 32, 4, 2, 2, 1, 4)),
    ],
    ids=str,
)
def test_iterations_in_turn_multiply_as_others(
    m: int, shape: tuple[int, int], blocksize: int, tile: tuning.Tile, nested: bool, bias: bool
) -> None:
    from halfbyte.backends.triton.fused import FusedPlan

    n, k = shape
    packed, absmax = ops.quantize_4bit(torch.randn(n, k, device="cuda") * 0.02, blocksize, "nf4", torch.uint8)
    first, *rest = scales_of(absmax, nested)
    weight = ops.dequantize_4bit(packed, first, blocksize, "nf4", [n, k], torch.float32, *rest)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    added = torch.randn(n, device="cuda", dtype=torch.bfloat16) if bias else None
    pairs, words = rounded_pairs_of("nf4", torch.bfloat16, 0), words_of("nf4", torch.bfloat16)
    plan = FusedPlan(m, n, k, blocksize, pairs, words, tile, k, nested=nested, bias=bias)
    exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
    for _ in range(3):
        out = torch.full((m, n), math.nan, device="cuda", dtype=torch.bfloat16)
        plan.run(x, packed, first, (rest[0], rest[1], rest[2]), added, out, 0)
        assert error(out, exact) <= 1.1 * error(F.linear(x, weight.bfloat16(), added), exact)


def test_levels_may_come_as_a_tensor() -> None:
    packed, absmax, weight = layer(256, 1024)
    x = torch.randn(2, 1024, device="cuda", dtype=torch.bfloat16)
    code = torch.from_numpy(codebook("nf4").table.copy()).cuda()
    torch.testing.assert_close(
        ops.gemv_4bit(x, packed, [256, 1024], absmax, code, 64), F.linear(x, weight), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("m", [1, 16, 64, 200])
def test_the_same_call_gives_the_same_bits_on_any_stream(m: int) -> None:
    packed, absmax, _weight = layer(4096, 4096)
    x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
    first = ops.gemm_4bit(x, packed, [4096, 4096], absmax, 64, "nf4")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(10):
            assert torch.equal(ops.gemm_4bit(x, packed, [4096, 4096], absmax, 64, "nf4"), first)


@pytest.mark.parametrize("m", [1, 33, 600])
def test_a_captured_graph_follows_its_input(m: int) -> None:
    packed, absmax, weight = layer(4096, 4096)
    x = torch.zeros(m, 4096, device="cuda", dtype=torch.bfloat16)
    ops.gemm_4bit(x, packed, [4096, 4096], absmax, 64, "nf4")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.gemm_4bit(x, packed, [4096, 4096], absmax, 64, "nf4")
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, F.linear(x, weight), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_it_compiles_as_one_graph(mode: str) -> None:
    packed, absmax, weight = layer(1024, 1024)

    @torch.compile(fullgraph=True, mode=mode)
    def product(x: Tensor) -> Tensor:
        return ops.gemm_4bit(x * 2, packed, [1024, 1024], absmax, 64, "nf4") + 1

    for _ in range(4):
        x = torch.randn(3, 1024, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(product(x).clone(), F.linear(x * 2, weight) + 1, rtol=2e-2, atol=2e-2)


def test_weights_of_more_than_two_billion_values() -> None:
    n, k = 70000, 32768
    row = torch.randn(k, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
    weight = row.expand(n, k).contiguous()
    packed, absmax = ops.quantize_4bit(weight, 64, "nf4", torch.uint8)
    del weight
    one, one_absmax = ops.quantize_4bit(row, 64, "nf4", torch.uint8)
    assert torch.equal(packed.view(n, -1)[[0, 65535, n - 1]], one.view(1, -1).expand(3, -1))
    y = ops.gemm_4bit(x, packed, [n, k], absmax, 64, "nf4")
    assert torch.equal(y, y[:, :1].expand_as(y))
    values = ops.dequantize_4bit(one, one_absmax, 64, "nf4", [1, k], torch.bfloat16)
    torch.testing.assert_close(y[:, 0], F.linear(x, values)[:, 0], rtol=2e-2, atol=0.5)


def test_scales_left_on_the_cpu_are_refused_not_read() -> None:
    packed, absmax, _weight = layer(256, 1024)
    x = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match="is on cpu"):
        ops.gemm_4bit(x, packed, [256, 1024], absmax.cpu(), 64, "nf4")


def test_state_that_begins_anywhere_in_memory_gives_the_same_product() -> None:
    packed, absmax, _weight = layer(256, 1024)
    x = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    want = ops.gemm_4bit(x, packed, [256, 1024], absmax, 64, "nf4")
    shifted = torch.cat([absmax[:1], absmax])[1:]
    assert shifted.data_ptr() % 16
    assert torch.equal(ops.gemm_4bit(x, packed, [256, 1024], shifted, 64, "nf4"), want)
