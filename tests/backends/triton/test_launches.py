"""Every launch fits its kernel: what launchers pass is bound to the kernels' parameters, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from torch.overrides import TorchFunctionMode
from triton.runtime.jit import JITFunction

from halfbyte.backends.triton import (
    ahead,
    blockwise,
    dequantize,
    device,
    embedding,
    gemm,
    grouped,
    int8,
    int8_plan,
    optimizer,
    quantize,
    tune,
)
from halfbyte.backends.triton.grouped_tiles import tile_for
from halfbyte.backends.triton.tuning import FUSED_BATCHES
from halfbyte.formats.dynamic import dynamic_map
from halfbyte.formats.int8 import STEP
from halfbyte.rules import FIELDS, rule_named, rule_names

DTYPES = {
    **dict.fromkeys(("w_ptr", "packed", "absmax_8bit"), torch.uint8),
    **dict.fromkeys(("absmax", "absmax_code", "absmax_offset", "levels", "row_absmax", "column_absmax"), torch.float32),
    **dict.fromkeys(("code", "cuts", "signed", "unsigned", "partial"), torch.float32),
    **dict.fromkeys(("order", "ends", "words", "count", "widest", "kind", "owners"), torch.int32),
    **dict.fromkeys(("cells", "table"), torch.int64),
}
"""What kernels take under these names."""

OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg"}
Launches = list[tuple[str, dict[str, Any]]]


class _OnCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU come on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Launched kernels and their arguments by name; none runs, and the GPU looks like an H100."""
    seen: Launches = []

    def bind(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        del warmup
        bound = inspect.signature(kernel.fn).bind(*args).arguments
        assert set(options) <= OPTIONS
        assert all(isinstance(size, int) and size > 0 for size in grid)
        for parameter in kernel.params:
            value = bound[parameter.name]
            if isinstance(value, torch.Tensor) and parameter.name not in ("x", "x_ptr"):
                assert value.is_contiguous(), f"{kernel.__name__}: {parameter.name} has gaps"
            if parameter.is_constexpr:
                assert not isinstance(value, torch.Tensor), f"{kernel.__name__}: {parameter.name} is a tensor"
            elif parameter.name in DTYPES:
                assert value is None or value.dtype == DTYPES[parameter.name], f"{kernel.__name__}: {parameter.name}"
            else:
                assert not isinstance(value, (bool, torch.dtype)), f"{kernel.__name__}: {parameter.name} is {value}"
        seen.append((kernel.__name__, dict(bound)))

    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20, shared_memory_per_block_optin=227 << 10
    )
    monkeypatch.setattr(JITFunction, "run", bind)
    monkeypatch.setattr(device, "_constant", lambda values, index: torch.from_numpy(values.copy()))  # noqa: ARG005
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)  # noqa: ARG005
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext(index))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    for module in (gemm, grouped, int8):
        monkeypatch.setattr(module, "_plans", {})
    monkeypatch.setattr(gemm, "_backward_plans", {})
    monkeypatch.setattr(grouped, "_sorters", {})
    monkeypatch.setattr(dequantize, "_launchers", {})
    _forget_gpus()
    with _OnCpu():
        yield seen
    _forget_gpus()


def _forget_gpus() -> None:
    for cached in vars(device).values():
        if hasattr(cached, "cache_clear") and cached is not device.words_of:
            cached.cache_clear()


def named(launches: Launches, kernel: str) -> list[dict[str, Any]]:
    return [arguments for name, arguments in launches if name == kernel]


def weight(shape: tuple[int, ...], nested: bool) -> dict[str, Any]:
    """A packed weight as arguments of ops."""
    blocks = math.prod(shape) // 64
    packed = torch.zeros(math.prod(shape) // 2, 1, dtype=torch.uint8)
    given = {"B": packed, "shapeB": shape, "blocksize": 64, "quant_type": "nf4"}
    if not nested:
        return {**given, "absmax": torch.zeros(blocks)}
    second = {"absmax_code": torch.zeros(256), "absmax_offset": torch.zeros(())}
    codes = torch.zeros(blocks, dtype=torch.uint8)
    return {**given, "absmax": torch.zeros(-(-blocks // 256)), "absmax_8bit": codes, **second}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_warmup_launches_fits_its_kernels(
    dtype: torch.dtype, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every route of a measured shape but slices of 16-bit weights, whose product is torch's and slow here.
    monkeypatch.setattr(ahead, "BATCHES", (*ahead.BATCHES[:-1], 257))
    said: list[str] = []
    ahead.warmup(said.append, [dtype], [(4096, 4096)])
    assert said[0].startswith("triton: kernels for 2 kinds of weights")
    routes = {"_gemm_4bit_small_batch_kernel", "_gemm_4bit_warpgroup_kernel", "_gemm_4bit_decoded_kernel"}
    slices = {"_gemm_4bit_portable_kernel", "_dequantize_4bit_kernel"}
    expected = slices if dtype == torch.float32 else {*routes, "_sum_partial_kernel"}
    expected |= {"_quantize_4bit_kernel", "_cells_8bit_kernel", "_quantize_blockwise_kernel"}
    assert {name for name, _ in launches} == expected
    decoded = {64, 128, 256, 257} if dtype == torch.bfloat16 else set()  # each a kernel of its own, 257 whole ones
    assert {given["M"] for given in named(launches, "_gemm_4bit_decoded_kernel")} == decoded
    for name, given in launches:
        if name.startswith("_gemm_4bit"):
            assert given["N"] == 4096
            assert given["NESTED"] == (given["absmax_8bit"] is not None)
            assert given["BIAS"] is False
        if name == "_gemm_4bit_decoded_kernel":
            assert (given["K"], given["BLOCK"], given["row_blocks"]) == (4096, 64, 64)


@pytest.mark.parametrize("bias", [False, True])
def test_warmup_launches_the_experts_kernel_for_few_and_many_tokens(bias: bool, launches: Launches) -> None:
    ahead.warmup(lambda line: None, [torch.bfloat16], [(64, 128)], [(16, 2, 128, 256, bias)])  # noqa: ARG005
    experts = named(launches, "_gemm_4bit_grouped_kernel")
    assert {given["S"] for given in experts} == {2 * tokens for tokens in ahead.EXPERT_TOKENS}
    assert {(given["E"], given["N"], given["BIAS"], given["repeat"]) for given in experts} == {(16, 128, bias, 1)}
    assert {given["NESTED"] for given in experts} == {False, True}
    assert named(launches, "_group_rows_kernel")


def test_every_tile_that_is_tuned_reaches_its_kernel_under_the_right_names(launches: Launches) -> None:
    n, k = 256, 512
    kinds: set[str] = set()
    for batch in FUSED_BATCHES:
        for tile in tune.candidates(batch, "sm_90", 227 << 10):
            launches.clear()
            tune._compile((batch, n, k, tile))
            given = launches[0][1]
            kinds.add(tile.kind)
            assert (given["BM"], given.get("BN", 128)) == (tile.batch, tile.rows)
            assert given["SPLIT"] == tile.split or tile.kind == "decoded"
            assert (given["M"], given["N"]) == (batch, n)
            assert given["NW"] == tile.n_warps
            if tile.kind == "decoded":
                assert (given["G"], given["STAGES"], given["PG"]) == (tile.unroll, tile.stages, tile.producers)
                continue
            assert given["U"] == tile.unroll
            assert given.get("KW", 1) == tile.k_warps
            assert given.get("TABLE", True) == tile.table
            assert given["AHEAD"] == tile.stages if tile.kind == "register" else given["STAGES"] >= tile.stages
    assert kinds == {"register", "staged", "warpgroup", "decoded"}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("m", [128, 256])
def test_the_backwards_launches_fit_their_kernels(m: int, nested: bool, launches: Launches) -> None:
    n, k = 4096, 2048
    gemm.gemm_4bit_dgrad(torch.zeros(m, n, dtype=torch.bfloat16), **weight((n, k), nested))
    (given,) = named(launches, "_gemm_4bit_decoded_kernel")
    assert (given["M"], given["N"], given["K"], given["ACROSS"], given["NESTED"]) == (m, n, k, True, nested)
    assert given["steps"] == n // 64


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "halves"), [(4, False), (64, True)])
def test_the_experts_launches_fit_their_kernels(rows: int, halves: bool, nested: bool, launches: Launches) -> None:
    count, n, k = 8, 256, 2048
    experts = torch.arange(rows) % count
    order, ends = grouped.group_rows(experts, count)
    x, bias = torch.zeros(rows // 2, k, dtype=torch.bfloat16), torch.zeros(count, n, dtype=torch.bfloat16)
    grouped.gemm_4bit_grouped(x, order=order, ends=ends, bias=bias, **weight((count, n, k), nested))
    (sorting,), (given,) = named(launches, "_group_rows_kernel"), named(launches, "_gemm_4bit_grouped_kernel")
    assert (sorting["S"], sorting["E"]) == (rows, count)
    tile = tile_for(device.gpu_of(0), rows, count, k)
    assert (given["BN"], given["BM"], given["U"], given["AHEAD"]) == (tile.rows, tile.batch, tile.unroll, tile.ahead)
    assert tile.halves == given["HALVES"] == halves
    assert (given["KW"], given["NW"], given["NESTED"], given["BIAS"]) == (tile.k_warps, tile.n_warps, nested, True)
    assert (given["S"], given["E"], given["repeat"], given["N"]) == (rows, count, 2, n)
    assert given["EP"] >= count + 1
    launches.clear()
    # Not in bf16: there torch would multiply many rows.
    grouped.gemm_4bit_grouped(x.half(), order=order, ends=ends, transposed=True, **weight((count, k, n), nested))
    (given,) = named(launches, "_gemm_4bit_grouped_portable_kernel")
    assert (given["S"], given["E"], given["N"], given["K"], given["repeat"]) == (rows, count, n, k, 2)
    assert (given["TRANSPOSED"], given["NESTED"], given["BIAS"], given["PRECISE"]) == (True, nested, False, False)


@pytest.mark.parametrize("threshold", [0.0, 6.0, 0, 6], ids=repr)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 64, 512, 1024])
def test_the_int8_plans_launches_fit_their_kernels(
    rows: int, full: bool, threshold: float, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = 256, 512
    monkeypatch.setattr(int8_plan, "GATHERED_WORK", 1024 * n * k)
    x, codes = torch.zeros(rows, k, dtype=torch.float16), torch.zeros(n, k, dtype=torch.int8)
    bias, beside = torch.zeros(n, dtype=torch.float16), torch.zeros(n, k, dtype=torch.float16) if full else None
    int8.int8_linear(x, codes, torch.zeros(n), threshold, bias, beside)
    split, last = threshold > 0, launches[-1][1]
    assert (last["N"], last["SPLIT"], last["BIAS"], last["threshold"]) == (n, split, True, threshold)
    assert last["STEP"] == STEP
    # Triton makes another kernel of a whole number, which then could not take 6.5.
    assert all(isinstance(given["threshold"], float) for _, given in launches if "threshold" in given)
    if rows == 1 and not (full and split):
        assert [name for name, _ in launches] == ["_int8_row_kernel"]
        assert last["K4"] == k // 4
        return
    gathered = split and not full and rows == 1024
    first = ["_clear_kernel"] * gathered
    names = [*first, "_int8_rows_kernel", *["_int8_gather_kernel"] * gathered, "_int8_product_kernel"]
    assert [name for name, _ in launches] == names
    assert (last["M"], last["K"], last["x_stride"], last["FULL"], last["RAW"]) == (rows, k, k, full and split, False)
    assert (len(last["row_absmax"]), len(last["column_absmax"])) == (rows, n)
    assert (last["CAPACITY"] > 0) == gathered
    if gathered:
        assert (launches[2][1]["M"], launches[2][1]["N"], launches[2][1]["CAPACITY"]) == (rows, n, last["CAPACITY"])


def test_the_other_int8_launches_fit_their_kernels(launches: Launches) -> None:
    a, b = torch.zeros(32, 512, dtype=torch.int8), torch.zeros(256, 512, dtype=torch.int8)
    int8.int8_vectorwise_quant(torch.zeros(32, 512, dtype=torch.float16))
    int8.int8_linear_matmul(a, b)
    int8.int8_scaled_mm(a, b, torch.zeros(32), torch.zeros(256))
    int8.int8_linear_dgrad(torch.zeros(32, 256, dtype=torch.float16), b, torch.zeros(256))
    products = ["_int8_product_kernel"] * 2
    assert [name for name, _ in launches] == ["_int8_rows_kernel", *products, "_int8_dequantize_kernel"]
    assert [(given["RAW"], given["BIAS"]) for given in named(launches, products[0])] == [(True, False), (False, False)]
    assert all((given["M"], given["N"], given["K"]) == (32, 256, 512) for given in named(launches, products[0]))


@pytest.mark.parametrize("nested", [False, True])
def test_the_launches_of_codes_fit_their_kernels(nested: bool, launches: Launches) -> None:
    values = torch.zeros(64, 128, dtype=torch.bfloat16)
    quantize.quantize_4bit(values, 64, "fp4", torch.uint8)
    code = torch.from_numpy(dynamic_map())
    codes, absmax = blockwise.quantize_blockwise(values, code, 256)
    blockwise.dequantize_blockwise(codes, absmax, code, 256, torch.bfloat16)
    table = weight((64, 128), nested)
    embedding.embedding_4bit(torch.zeros(3, dtype=torch.int64), dtype=torch.float16, **table)
    packed, shape = table.pop("B"), table.pop("shapeB")
    dequantize.dequantize_4bit(packed, shape=shape, dtype=torch.float16, **table)
    assert [name for name, _ in launches] == [
        "_quantize_4bit_kernel",
        "_cells_8bit_kernel",
        "_quantize_blockwise_kernel",
        "_dequantize_blockwise_kernel",
        "_embedding_4bit_kernel",
        "_dequantize_4bit_kernel",
    ]
    assert (launches[0][1]["BLOCKSIZE"], launches[0][1]["SIGN"], launches[0][1]["numel"]) == (64, True, 64 * 128)
    assert launches[2][1]["PROGRAMS"] * launches[1][1]["BLOCK"] == blockwise.CELLS
    for _, given in launches[4:]:
        assert (given["BLOCKSIZE"], given["NESTED"]) == (64, nested)


@pytest.mark.parametrize("rule", rule_names())
@pytest.mark.parametrize("eight", [False, True])
def test_the_optimizers_launches_fit_their_kernel(eight: bool, rule: str, launches: Launches) -> None:
    signed, numel = rule_named(rule).signed, 2048 + 7
    param, grad = torch.zeros(numel, dtype=torch.bfloat16), torch.zeros(numel, dtype=torch.float32)
    hyper = torch.arange(float(len(FIELDS)))
    if eight:
        states = [torch.zeros(numel, dtype=torch.uint8) for _ in signed]
        absmax, maps = [torch.zeros(9) for _ in signed], [torch.from_numpy(dynamic_map(one)) for one in signed]
        optimizer.optimizer_step_8bit([param], [grad], states, absmax, maps, hyper, 256, rule, False, 5)
    else:
        optimizer.optimizer_step_32bit([param], [grad], [torch.zeros(numel) for _ in signed], hyper, rule, False, 5)
    assert [given["MASKED"] for given in named(launches, "_optimizer_kernel")] == [False, True]
    for given in named(launches, "_optimizer_kernel"):
        assert [given[name] for name in FIELDS] == hyper.tolist()
        assert (given["STATES"], given["EIGHT"], given["seed"]) == (len(signed), eight, 5)
        assert (given["RANDOM"], given["LOADED"], given["PTX"]) == (True, False, False)
        assert given["ROWS"] * given["BLOCKSIZE"] == optimizer.VALUES
        kinds = [1 if one else 2 for one in signed] if eight else [0] * len(signed)
        assert [given[f"KIND{place}"] for place in range(len(signed))] == kinds


def with_gaps(tensor: Any) -> Any:
    return torch.stack([tensor, tensor], -1)[..., 0] if isinstance(tensor, torch.Tensor) else tensor


@pytest.mark.parametrize("nested", [False, True])
def test_tensors_with_gaps_reach_no_kernel(nested: bool, launches: Launches) -> None:
    n, k, count = 256, 512, 4
    one = {name: with_gaps(value) for name, value in weight((n, k), nested).items()}
    many = {name: with_gaps(value) for name, value in weight((count, n, k), nested).items()}
    rows = torch.zeros(8, k, dtype=torch.bfloat16)
    for x in (rows[:1], rows, rows.float()):
        gemm.gemm_4bit(x, bias=with_gaps(torch.zeros(n, dtype=x.dtype)), **one)
    gemm.gemm_4bit_dgrad(torch.zeros(8, n, dtype=torch.bfloat16), **one)
    order, ends = (with_gaps(torch.zeros(size, dtype=torch.int32)) for size in (8, count))
    for x in (rows, rows.float()):
        bias = with_gaps(torch.zeros(count, n, dtype=x.dtype))
        grouped.gemm_4bit_grouped(x, order=order, ends=ends, bias=bias, **many)
    embedding.embedding_4bit(torch.zeros(3, dtype=torch.int64), dtype=torch.float16, **one)
    packed, shape = one.pop("B"), one.pop("shapeB")
    dequantize.dequantize_4bit(packed, shape=shape, dtype=torch.float16, **one)
    code = with_gaps(torch.from_numpy(dynamic_map()))
    codes, absmax = blockwise.quantize_blockwise(with_gaps(rows), code, 256)
    blockwise.dequantize_blockwise(with_gaps(codes), with_gaps(absmax), code, 256, torch.float16)
    assert len({name for name, _ in launches}) >= 8  # the launches looked at every tensor
