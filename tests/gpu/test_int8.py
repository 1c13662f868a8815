"""LLM.int8() on a GPU: what the reference computes, with no wait for the GPU, and in a CUDA graph."""

import pytest
import torch

import halfbyte.functional as F
from halfbyte.backends.reference import int8 as reference
from halfbyte.backends.triton import int8, int8_plan
from halfbyte.errors import ArgumentError
from halfbyte.nn import Linear8bitLt
from tests.support.hard_inputs import DTYPES
from tests.support.int8_inputs import THRESHOLD, activations, int8_weight
from tests.support.tolerances import TOLERANCES, Tolerance, close, product, rounding

pytestmark = pytest.mark.gpu
ops = torch.ops.halfbyte
SHAPES = [
    (1, 4096, 64), (1, 63, 5), (1, 512, 48), (1, 14336, 40), (3, 65, 33), (16, 128, 100), (17, 300, 70),
    (200, 1000, 129), (600, 512, 260),
]  # fmt: skip


@pytest.fixture(autouse=True)
def gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outlier columns are copied side by side from 256 rows on, however small the product."""
    monkeypatch.setattr(int8_plan, "GATHERED_WORK", 0)
    monkeypatch.setattr(int8, "_plans", {})


def on_gpu(batch: int, columns: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    CB, SCB = int8_weight(rows, columns)
    return activations(batch, columns, dtype).cuda(), CB.cuda(), SCB.cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_the_references(shape: tuple[int, int, int], threshold: float, dtype: torch.dtype) -> None:
    A, CB, SCB = on_gpu(*shape, dtype)
    bias = torch.linspace(-1, 1, shape[2])
    found = ops.int8_linear(A, CB, SCB, threshold, bias.cuda()).cpu()
    A, CB, SCB = A.cpu(), CB.cpu(), SCB.cpu()
    expected = reference.int8_linear(A.float(), CB, SCB, threshold, bias)
    terms = A.double().abs() @ (CB.double().abs() * SCB.double()[:, None] / 127).t() + bias.double().abs()
    allowed = terms * TOLERANCES["int8 product"].relative + expected.double().abs() * rounding(dtype).relative
    close("product", found, expected, Tolerance(1.0, "both rows of the table"), allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 1024, 100), (600, 512, 260), (257, 14336, 40)])
def test_outlier_columns_that_are_not_copied_side_by_side_are_looked_up(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_plan, "GATHERED_WORK", 1 << 60)
    A, CB, SCB = on_gpu(*shape, dtype)
    found = ops.int8_linear(A, CB, SCB, THRESHOLD).double().cpu()
    expected = reference.int8_linear(A.cpu().float(), CB.cpu(), SCB.cpu(), THRESHOLD).double()
    terms = A.cpu().double().abs() @ (CB.cpu().double().abs() * SCB.cpu().double()[:, None] / 127).t()
    allowed = terms * TOLERANCES["int8 product"].relative + expected.abs() * rounding(dtype).relative
    close("product", found, expected, Tolerance(1.0, "both rows of the table"), allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 63, 4096, 4097])
def test_codes_and_sums_are_the_references(columns: int, dtype: torch.dtype) -> None:
    A = activations(37, columns, dtype)
    codes, absmax, _ = F.int8_vectorwise_quant(A.cuda())
    want, scales, _ = reference.int8_vectorwise_quant(A)
    assert torch.equal(codes.cpu(), want)
    assert torch.equal(absmax.cpu(), scales)
    B = int8_weight(50, columns)[0]
    assert torch.equal(F.int8_linear_matmul(codes, B.cuda()).cpu(), reference.int8_linear_matmul(want, B))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
def test_a_row_without_outliers_has_the_same_bits_in_every_batch(threshold: float, dtype: torch.dtype) -> None:
    x = activations(600, 512, dtype, outliers=False).cuda()
    CB, SCB = (tensor.cuda() for tensor in int8_weight(260, 512))
    bias = torch.linspace(-1, 1, 260).cuda()
    whole = ops.int8_linear(x, CB, SCB, threshold, bias)
    for batch in (1, 3, 16, 17, 64, 100, 300):
        assert torch.equal(ops.int8_linear(x[:batch], CB, SCB, threshold, bias), whole[:batch])


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_meet_the_unquantized_weight_where_it_is_given(dtype: torch.dtype) -> None:
    A, CB, SCB = on_gpu(5, 200, 40, dtype)
    W = (CB * SCB[:, None] / 100).to(dtype)
    found = ops.int8_linear(A, CB, SCB, THRESHOLD, None, W).float().cpu()
    expected = reference.int8_linear(A.cpu().float(), CB.cpu(), SCB.cpu(), THRESHOLD, None, W.cpu())
    size = A.cpu().double().abs() @ W.cpu().double().abs().t()
    close("product", found, expected, rounding(dtype), size)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("batch", [1, 20, 300])
def test_what_is_not_finite_stays_in_its_row(batch: int, value: float) -> None:
    A, CB, SCB = on_gpu(batch, 512, 40, torch.bfloat16)
    clean = ops.int8_linear(A, CB, SCB, THRESHOLD).cpu()
    A[0, 7] = value
    found = ops.int8_linear(A, CB, SCB, THRESHOLD).cpu()
    expected = reference.int8_linear(A.cpu(), CB.cpu(), SCB.cpu(), THRESHOLD)
    assert torch.equal(found[0].isfinite(), expected[0].isfinite())
    assert torch.equal(found[0].isnan(), expected[0].isnan())
    assert torch.equal(found[1:], clean[1:])


def test_more_outlier_columns_than_are_copied_side_by_side_are_all_counted() -> None:
    A, CB, SCB = on_gpu(300, 1024, 100, torch.bfloat16)
    assert (A.abs() >= THRESHOLD).any(0).sum() > 64
    found = ops.int8_linear(A, CB, SCB, THRESHOLD).double().cpu()
    expected = reference.int8_linear(A.cpu().float(), CB.cpu(), SCB.cpu(), THRESHOLD).double()
    close("product", found, expected, rounding(torch.bfloat16), expected.abs() + 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64, 4096), (5, 33, 65), (300, 512, 260)])
def test_gradients_are_the_references(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    CB, SCB = int8_weight(shape[2], shape[1])
    grad = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(4)).to(dtype)
    given = grad.cuda(), CB.cuda(), SCB.cuda()
    found = ops.int8_linear_dgrad(*given).cpu()
    assert torch.equal(ops.int8_linear_dgrad(*given).cpu(), found)  # launched by address
    weight = F.int8_vectorwise_dequant(CB, SCB).double()
    close("gradient", found, grad.double() @ weight, product(dtype), grad.double().abs() @ weight.abs())


@pytest.mark.parametrize("batch", [1, 33])
def test_layers_compile_whole_forward_and_backward(batch: int) -> None:
    made, x = layer(batch)
    x.requires_grad_()
    compiled = torch.compile(made, fullgraph=True)
    out, expected = compiled(x), made(x)
    assert torch.equal(out, expected)
    grads = [torch.autograd.grad(value.float().sum(), x)[0] for value in (out, expected)]
    assert torch.equal(*grads)


def layer(batch: int) -> tuple[Linear8bitLt, torch.Tensor]:
    torch.manual_seed(3)
    made = Linear8bitLt(512, 256, has_fp16_weights=False, threshold=THRESHOLD).cuda()
    return made, activations(batch, 512, torch.bfloat16).cuda()


@pytest.mark.parametrize("batch", [1, 33, 300])
def test_a_forward_pass_never_waits_for_the_gpu(batch: int) -> None:
    made, x = layer(batch)
    with torch.no_grad():
        expected = made(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = made(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("batch", [1, 33, 300])
def test_a_cuda_graph_follows_outliers_that_come_and_go(batch: int) -> None:
    made, x = layer(batch)
    with torch.no_grad():
        made(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = made(x)
        for seed, outliers in ((1, True), (2, False), (3, True)):
            x.copy_(activations(batch, 512, torch.bfloat16, outliers, seed))
            graph.replay()
            replayed = out.clone()
            assert torch.equal(replayed, made(x))


@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
@pytest.mark.parametrize("batch", [1, 33, 300])
def test_repeated_calls_give_the_ops_bits(batch: int, threshold: float) -> None:
    made, x = layer(batch)
    made.state.threshold = threshold
    with torch.no_grad():
        expected = ops.int8_linear(x, made.weight.CB, made.weight.SCB, threshold, made.bias)
        made(x)
        assert made._repeated is not None
        assert made._repeated._calls[x.shape] is not None
        for given in (x, x[None], torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)):
            for _ in range(3):
                assert torch.equal(made(given).view_as(expected), expected)


@pytest.mark.parametrize("batch", [1, 33, 300])
def test_repeated_training_steps_have_the_first_ones_gradients(batch: int) -> None:
    made, x = layer(batch)
    x.requires_grad_()
    found = [(*torch.autograd.grad((out := made(x)).float().square().sum(), (x, made.bias)), out) for _ in range(3)]
    assert made._repeated is not None
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("batch", [1, 33, 300])
def test_repeated_calls_on_several_streams_do_not_disturb_each_other(batch: int) -> None:
    made, x = layer(batch)
    inputs = [x, activations(batch, 512, torch.bfloat16, seed=9).cuda(), torch.zeros_like(x)]
    with torch.no_grad():
        expected = [made(one) for one in inputs]
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        found = [[] for _ in inputs]
        for _ in range(50):
            for one, stream, results in zip(inputs, streams, found, strict=True):
                with torch.cuda.stream(stream):
                    results.append(made(one))
        torch.cuda.synchronize()
    for results, want in zip(found, expected, strict=True):
        assert all(torch.equal(result, want) for result in results)


@pytest.mark.parametrize("batch", [4, 300])
def test_bf16_activations_beyond_fp16_stay_finite(batch: int) -> None:
    made, x = layer(batch)
    out = made(x * 1e6)
    assert out.isfinite().all()
    assert out.abs().max() > 65504


def test_a_layer_on_the_cpu_refuses_an_activation_on_the_gpu() -> None:
    made, x = layer(3)
    with torch.no_grad():
        made(x), made(x)
        with pytest.raises(ArgumentError, match="8-bit layer is on cpu"):
            made.cpu()(x)
        assert made.cuda()(x).isfinite().all()


def test_scales_stay_with_a_layer_that_goes_to_the_cpu_and_back() -> None:
    made, x = layer(3)
    expected = made(x)
    assert torch.equal(made.cpu().cuda()(x), expected)
    assert made.weight.SCB.is_cuda
    made.weight = made.weight.to("cuda")
    assert torch.equal(made(x), expected)
