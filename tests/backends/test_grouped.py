"""Products with many experts, from every backend that runs here, against one dense product a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.autograd.grouped_4bit import group_rows, grouped_matmul_4bit
from halfbyte.backends.cpu import grouped as cpu
from halfbyte.backends.reference import grouped as reference
from halfbyte.errors import ArgumentError, QuantStateMissingError
from halfbyte.functional import dequantize_4bit, kernel_scales, quantize_4bit
from halfbyte.quant_state import QuantState
from tests.support.hard_inputs import DTYPES

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.gemm_4bit_grouped,
    "cpu": cpu.gemm_4bit_grouped,
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
"""Relative error against float64: sums in fp32, results (and, in the reference, weights) rounded to the dtype."""


def stack(count: int, n: int, k: int, nested: bool, blocksize: int = 64) -> tuple[Tensor, QuantState, Tensor]:
    torch.manual_seed(5)
    packed, state = quantize_4bit(
        torch.randn(count, n, k) * 0.1, quant_type="nf4", compress_statistics=nested, blocksize=blocksize
    )
    return packed, state, dequantize_4bit(packed, state)


def exact(x: Tensor, dense: Tensor, experts: Tensor, bias: Tensor, transposed: bool) -> Tensor:
    """Product by product in float64."""
    chosen = experts.shape[1]
    rows: list[Tensor] = []
    for s, expert in enumerate(experts.flatten().tolist()):
        if not 0 <= expert < dense.shape[0]:
            rows.append(torch.zeros(bias.shape[1], dtype=torch.float64))
            continue
        weight = dense[expert].double()
        weight = weight.T if transposed else weight
        rows.append(weight @ x[s // chosen].double() + bias[expert].double())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_row_is_multiplied_by_its_own_expert(
    name: str, transposed: bool, nested: bool, dtype: torch.dtype
) -> None:
    count, n, k = 5, 48, 128
    packed, state, dense = stack(count, n, k, nested)
    x, bias = torch.randn(9, n if transposed else k).to(dtype), torch.randn(count, k if transposed else n).to(dtype)
    experts = torch.randint(-1, count + 1, (9, 3))
    order, ends = group_rows(experts, count)
    scales = kernel_scales(state)
    result = BACKENDS[name](x, packed, [count, n, k], order, ends, scales[0], 64, "nf4", transposed, bias, *scales[1:])
    expected = exact(x, dense, experts, bias, transposed)
    assert result.dtype == dtype
    assert ((result.double() - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]
    assert not result[experts.flatten() == count].any()


@pytest.mark.parametrize("blocksize", [32, 64, 1024])
def test_experts_whose_nested_scales_begin_within_a_second_level_block_are_right(blocksize: int) -> None:
    count, n, k = 4, 64, 80
    packed, state, dense = stack(count, n, k, True, blocksize)
    x, experts = torch.randn(6, k), torch.tensor([[3], [1], [0], [2], [3], [1]])
    order, ends = group_rows(experts, count)
    result = grouped_matmul_4bit(x, packed, state, order, ends)
    expected = exact(x, dense, experts, torch.zeros(count, n), False)
    assert torch.allclose(result.double(), expected, atol=1e-5)


def test_rows_are_sorted_stably_and_strangers_come_last() -> None:
    order, ends = group_rows(torch.tensor([[1, 7], [-3, 0], [1, 0]], dtype=torch.int32), 2)
    assert order.tolist() == [3, 5, 0, 4, 1, 2]
    assert ends.tolist() == [2, 4]


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_reach_rows_and_bias_and_second_derivatives_exist(transposed: bool) -> None:
    count, n, k = 3, 4, 16
    packed, state, _ = stack(count, n, k, False)
    x = torch.randn(4, n if transposed else k, dtype=torch.float32, requires_grad=True)
    bias = torch.randn(count, k if transposed else n, requires_grad=True)
    order, ends = group_rows(torch.tensor([[0, 2], [2, 3], [0, 0], [1, 2]]), count)

    def call(x: Tensor, bias: Tensor) -> Tensor:
        return grouped_matmul_4bit(x, packed, state, order, ends, transposed=transposed, bias=bias).sin()

    torch.manual_seed(0)
    probe = torch.randn(8, bias.shape[1])
    grads = torch.autograd.grad((call(x, bias) * probe).sum(), (x, bias), create_graph=True)
    step = 1e-3
    for leaf, grad in zip((x, bias), grads, strict=True):
        direction = torch.randn_like(leaf)
        moved = [(x + s * direction, bias) if leaf is x else (x, bias + s * direction) for s in (step, -step)]
        slope = sum(sign * (call(*at) * probe).sum() for sign, at in zip((1, -1), moved, strict=True)) / (2 * step)
        assert torch.allclose(slope, (grad * direction).sum(), rtol=5e-3, atol=5e-3)
    (second,) = torch.autograd.grad(grads[0].square().sum(), x)
    assert bool(second.isfinite().all())
    assert bool(second.any())


def test_no_rows_make_an_empty_product() -> None:
    packed, state, _ = stack(3, 8, 16, False)
    order, ends = group_rows(torch.empty(0, 2, dtype=torch.int64), 3)
    assert grouped_matmul_4bit(torch.empty(0, 16), packed, state, order, ends).shape == (0, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(2, 15)}, r"activation of shape \(2, 15\)"),
        ({"x": torch.randn(3, 16)}, "4 products of 3 rows"),
        ({"order": torch.zeros(4, dtype=torch.int64)}, "order is torch.int64"),
        ({"bias": torch.zeros(3, 9)}, r"bias is torch.float32 of shape \(3, 9\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    packed, state, _ = stack(3, 8, 16, False)
    order, ends = group_rows(torch.tensor([[0, 1], [2, 2]]), 3)
    given: dict[str, Any] = {"x": torch.randn(2, 16), "order": order, "bias": None, **changes}
    with pytest.raises(ArgumentError, match=message):
        grouped_matmul_4bit(given["x"], packed, state, given["order"], ends, bias=given["bias"])


def test_experts_of_part_blocks_are_refused() -> None:
    packed, state, _ = stack(2, 3, 32, False)
    order, ends = group_rows(torch.tensor([[0, 1]]), 2)
    with pytest.raises(ArgumentError, match="whole blocks for each expert"):
        grouped_matmul_4bit(torch.randn(1, 32), packed, state, order, ends)


def test_codes_without_a_state_say_what_to_do() -> None:
    order, ends = group_rows(torch.tensor([[0, 1]]), 2)
    with pytest.raises(QuantStateMissingError, match="hint: move the module"):
        grouped_matmul_4bit(torch.randn(1, 32), torch.zeros(4, 1, dtype=torch.uint8), None, order, ends)
