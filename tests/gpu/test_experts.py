"""Products with many experts on a GPU, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from halfbyte.backends.reference import grouped as reference
from halfbyte.functional import kernel_scales, quantize_4bit

pytestmark = pytest.mark.gpu

ops = torch.ops.halfbyte
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
"""Relative error of a product (norm over norm): fp32 sums in another order; 16-bit weights and results are rounded."""


def case(count: int, n: int, k: int, *, nested: bool = False, blocksize: int = 64, dtype: Any = torch.bfloat16) -> Any:
    weight = torch.randn(count, n, k, device="cuda", dtype=dtype) * 0.05
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested, blocksize=blocksize)
    return packed, kernel_scales(state)


def close(result: torch.Tensor, exact: torch.Tensor) -> bool:
    error = (result.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)
    return error.item() <= TOLERANCE[result.dtype]


@pytest.mark.parametrize("rows", [1, 63, 64, 500, 5000])
@pytest.mark.parametrize("count", [1, 8, 128, 300])
def test_rows_are_grouped_as_in_the_reference(rows: int, count: int) -> None:
    experts = torch.randint(-1, count + 2, (rows,), device="cuda")
    for result, exact in zip(ops.group_rows(experts, count), reference.group_rows(experts, count), strict=True):
        assert torch.equal(result, exact)


@pytest.mark.parametrize(
    ("dtype", "transposed", "nested"),
    [
        (torch.bfloat16, False, False),
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, True),
        (torch.float16, False, False),
        (torch.float16, True, False),
        (torch.float32, False, True),
        (torch.float32, True, False),
    ],
)
@pytest.mark.parametrize("tokens", [1, 7, 90])
def test_the_grouped_product_is_the_references(dtype: Any, transposed: bool, nested: bool, tokens: int) -> None:
    count, n, k = 6, 256, 512
    packed, scales = case(count, n, k, nested=nested, dtype=dtype)
    x = torch.randn(tokens, n if transposed else k, device="cuda", dtype=dtype)
    bias = torch.randn(count, k if transposed else n, device="cuda", dtype=dtype)
    order, ends = ops.group_rows(torch.randint(0, count + 1, (tokens, 3), device="cuda"), count)
    arguments = (x, packed, [count, n, k], order, ends, scales[0], 64, "nf4", transposed, bias, *scales[1:])
    assert close(ops.gemm_4bit_grouped(*arguments), reference.gemm_4bit_grouped(*arguments))


@pytest.mark.parametrize(
    ("shape", "blocksize"),
    [
        ((3, 72, 192), 64),
        ((4, 100, 128), 32),
        ((2, 64, 96), 64),
        ((5, 33, 64), 64),
        ((2, 1000, 4096), 256),
        ((2, 64, 192), 256),
    ],
)
def test_odd_shapes_and_blocks_are_right_too(shape: tuple[int, int, int], blocksize: int) -> None:
    packed, scales = case(*shape, blocksize=blocksize)
    x = torch.randn(40, shape[2], device="cuda", dtype=torch.bfloat16)
    order, ends = ops.group_rows(torch.randint(0, shape[0], (40, 2), device="cuda"), shape[0])
    arguments = (x, packed, list(shape), order, ends, scales[0], blocksize, "nf4")
    assert close(ops.gemm_4bit_grouped(*arguments), reference.gemm_4bit_grouped(*arguments))


def test_views_of_activations_and_of_state_are_read_where_they_begin() -> None:
    count, n, k = 3, 64, 128
    packed, scales = case(count, n, k)
    x = torch.randn(k, 12, device="cuda", dtype=torch.bfloat16).t()
    shifted = torch.cat([packed.new_zeros(4, 1), packed])[4:]
    absmax = torch.cat([scales[0].new_zeros(1), scales[0]])[1:]
    order, ends = ops.group_rows(torch.randint(0, count, (12, 2), device="cuda"), count)
    exact = reference.gemm_4bit_grouped(x, packed, [count, n, k], order, ends, scales[0], 64, "nf4")
    for codes, first in ((packed, scales[0]), (shifted, scales[0]), (packed, absmax)):
        for _ in range(2):  # compiled, then launched directly
            assert close(ops.gemm_4bit_grouped(x, codes, [count, n, k], order, ends, first, 64, "nf4"), exact)


def test_low_rank_factors_beside_experts_are_right_with_their_gradients() -> None:
    from halfbyte.nn.experts_low_rank import low_rank

    order, ends = ops.group_rows(torch.randint(0, 5, (30, 2), device="cuda"), 4)
    leaves = [torch.randn(*s, device="cuda") * 0.3 for s in ((30, 64), (4, 8, 64), (4, 96, 8))]
    results: list[list[torch.Tensor]] = []
    for dtype in (torch.bfloat16, torch.float32):  # torch's grouped product, and one product for each expert
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        out = low_rank(own[0].to(dtype), order, ends, own[1], own[2], 0.5)
        out.float().square().sum().backward()
        results.append([out.float(), *[leaf.grad for leaf in own]])
    for fast, exact in zip(*results, strict=True):
        assert ((fast - exact).norm() / exact.norm()).item() < 2e-2


@pytest.mark.parametrize("nested", [False, True])
def test_tiles_with_few_rows_may_be_computed_as_half_ones(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.backends.triton import grouped
    from halfbyte.backends.triton.grouped_tiles import GroupedTile

    if grouped.fused_kernel() is None:
        pytest.skip("this Triton has no Gluon that halfbyte knows")
    tile = GroupedTile(32, 64, 2, 2, 4, 1, halves=True)
    monkeypatch.setattr(grouped, "tile_for", lambda *_: tile)
    monkeypatch.setattr(grouped, "_plans", {})
    count, n, k = 6, 200, 512
    packed, scales = case(count, n, k, nested=nested)
    # Experts with no row, half a tile, one row more, a whole tile, more than one; and rows of no expert.
    experts = torch.repeat_interleave(torch.arange(1, 7), torch.tensor([16, 17, 32, 33, 49, 20]))
    experts = experts[torch.randperm(experts.numel())].cuda().view(-1, 1)
    x = torch.randn(experts.numel(), k, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(count, n, device="cuda", dtype=torch.bfloat16)
    order, ends = ops.group_rows(experts, count)
    arguments = (x, packed, [count, n, k], order, ends, scales[0], 64, "nf4", False, bias, *scales[1:])
    assert close(ops.gemm_4bit_grouped(*arguments), reference.gemm_4bit_grouped(*arguments))
    assert grouped._plans


def test_a_graph_follows_another_routing() -> None:
    count, n, k = 8, 128, 256
    packed, scales = case(count, n, k)
    x = torch.randn(16, k, device="cuda", dtype=torch.bfloat16)
    experts = torch.randint(0, count, (16, 2), device="cuda")

    def call() -> torch.Tensor:
        order, ends = ops.group_rows(experts, count)
        return ops.gemm_4bit_grouped(x, packed, [count, n, k], order, ends, scales[0], 64, "nf4")

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    experts.copy_(torch.randint(0, count, (16, 2), device="cuda"))
    graph.replay()
    assert torch.equal(out, call())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_many_rows_go_through_slices_and_are_right(transposed: bool, with_bias: bool) -> None:
    count, n, k = 3, 192, 256
    packed, scales = case(count, n, k, nested=True)
    width = k if transposed else n
    x = torch.randn(900, n if transposed else k, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(count, width, device="cuda", dtype=torch.bfloat16) if with_bias else None
    order, ends = ops.group_rows(torch.randint(0, count + 1, (900, 2), device="cuda"), count)
    arguments = (x, packed, [count, n, k], order, ends, scales[0], 64, "nf4", transposed, bias, *scales[1:])
    assert close(ops.gemm_4bit_grouped(*arguments), reference.gemm_4bit_grouped(*arguments))


def test_slices_smaller_than_the_result_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.backends.triton import grouped_slices

    monkeypatch.setattr(grouped_slices, "SLICE_BYTES", 1 << 16)
    test_many_rows_go_through_slices_and_are_right(False, True)
    test_many_rows_go_through_slices_and_are_right(True, True)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("transformers")
    import halfbyte
    from tests.integrations.moe_models import save_random

    halfbyte.install_as_bitsandbytes(replace=True)
    folder = tmp_path_factory.mktemp("mixtral")
    save_random("mixtral", folder)
    return folder


def loaded(folder: Any) -> Any:
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": 0}
    ).eval()


def test_a_model_loads_on_the_gpu_and_agrees_with_its_dequantized_self(mixtral: Any) -> None:
    from halfbyte.nn import receipt
    from tests.integrations.moe_models import IDS, experts_of

    model = loaded(mixtral)
    assert receipt(model, show=False).share > 0.9
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    layer = experts_of(model)[0]
    x = torch.randn(40, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    index, weights = torch.randint(0, 8, (40, 2), device="cuda"), torch.rand(40, 2, device="cuda").bfloat16()
    out = layer(x, index, weights)
    out.float().square().sum().backward()
    y = x.detach().float().requires_grad_()
    dense = layer.give_back(torch.float32)
    expected = dense(y, index, weights.float())
    expected.square().sum().backward()
    assert y.grad is not None
    assert x.grad is not None
    for result, exact in ((out, expected), (x.grad, y.grad)):
        # bf16 products of bf16 inner values: 2^-8 for each of three roundings.
        assert ((result.float() - exact).norm() / exact.norm()).item() < 1.5e-2
    assert loaded(mixtral).generate(IDS.cuda(), max_new_tokens=4, do_sample=False).shape == (2, 16)


def test_the_layer_compiles_whole_and_runs_in_a_cuda_graph(mixtral: Any) -> None:
    from tests.integrations.moe_models import experts_of

    layer = experts_of(loaded(mixtral))[0]
    x = torch.randn(16, 128, device="cuda", dtype=torch.bfloat16)
    index, weights = torch.randint(0, 8, (16, 2), device="cuda"), torch.rand(16, 2, device="cuda").bfloat16()
    with torch.no_grad():
        plain = layer(x, index, weights)
        compiled = torch.compile(layer, fullgraph=True)(x, index, weights)
        assert ((compiled.float() - plain.float()).norm() / plain.float().norm()).item() < 1e-2
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x, index, weights)
        index.copy_(torch.randint(0, 8, (16, 2), device="cuda"))
        graph.replay()
        assert torch.equal(out, layer(x, index, weights))


def test_nothing_waits_for_the_gpu(mixtral: Any) -> None:
    from tests.integrations.moe_models import experts_of

    layer = experts_of(loaded(mixtral))[0]
    for tokens in (3, 700):
        x = torch.randn(tokens, 128, device="cuda", dtype=torch.bfloat16)
        index = torch.randint(0, 8, (tokens, 2), device="cuda")
        weights = torch.rand(tokens, 2, device="cuda").bfloat16()
        layer(x, index, weights)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x, index, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")
