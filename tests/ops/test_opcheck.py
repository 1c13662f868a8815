"""Every defined op passes torch.library.opcheck: schema, fake, autograd registration, tracing with dynamic shapes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import halfbyte.functional as F
from halfbyte.ops import defined_ops
from halfbyte.rules import hyper, rule_named
from tests.support.hard_inputs import DTYPES, weights

ops = torch.ops.halfbyte
N, K, BLOCK = 24, 64, 32

Call = tuple[tuple[Any, ...], dict[str, Any]]


def packed(nested: bool = False) -> tuple[torch.Tensor, list[Any]]:
    """Codes of an (N, K) weight and the four scale arguments."""
    codes, state = F.quantize_4bit(weights(N * K).view(N, K), None, None, BLOCK, nested, "nf4")
    return codes, list(F.kernel_scales(state))


def _dequantize(dtype: torch.dtype, nested: bool, **named: Any) -> Call:
    B, (absmax, *extra) = packed(nested)
    return (B, absmax, BLOCK, "nf4", [N, K], dtype, *extra), named


def _gemm(dtype: torch.dtype, nested: bool) -> Call:
    B, (absmax, *extra) = packed(nested)
    x, bias = torch.randn(3, 2, K, dtype=dtype), torch.randn(N, dtype=dtype)
    return (x, B, [N, K], absmax, BLOCK, "nf4", bias, *extra), {}


def _dgrad(dtype: torch.dtype, nested: bool) -> Call:
    B, (absmax, *extra) = packed(nested)
    return (torch.randn(3, 2, N, dtype=dtype), B, [N, K], absmax, BLOCK, "nf4", *extra), {}


def _gemv(dtype: torch.dtype, **named: Any) -> Call:
    B, (absmax, *_) = packed()
    return (torch.randn(1, K, dtype=dtype), B, [N, K], absmax, F.get_4bit_type("nf4", "cpu"), BLOCK), named


def _embedding(dtype: torch.dtype, nested: bool) -> Call:
    B, (absmax, *extra) = packed(nested)
    return (torch.tensor([[0, N - 1], [3, 3]]), B, [N, K], absmax, BLOCK, "nf4", dtype, *extra), {}


def _grouped(dtype: torch.dtype, nested: bool, transposed: bool) -> Call:
    codes, state = F.quantize_4bit(weights(3 * N * K).view(3, N, K), None, None, BLOCK, nested, "nf4")
    absmax, *extra = F.kernel_scales(state)
    order, ends = ops.group_rows(torch.tensor([[0, 2], [2, 3], [0, 0]]), 3)
    x = torch.randn(3, N if transposed else K, dtype=dtype)
    bias = torch.randn(3, K if transposed else N, dtype=dtype)
    return (x, codes, [3, N, K], order, ends, absmax, BLOCK, "nf4", transposed, bias, *extra), {}


def _codes() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    code = F.create_dynamic_map()
    codes, absmax = ops.quantize_blockwise(weights(5 * 70).view(5, 70), code, 64)
    return codes, absmax, code


def _dequantize_blockwise(dtype: torch.dtype, **named: Any) -> Call:
    codes, absmax, code = _codes()
    return (codes, absmax, code, 64, dtype), named


def _quantize_blockwise(dtype: torch.dtype, **named: Any) -> Call:
    return (weights(5 * 70, dtype).view(5, 70), F.create_dynamic_map(), 64), named


def _step(dtype: torch.dtype, bits: int, rule: str, **named: Any) -> Call:
    """Two parameters, one of them with a gradient of another dtype."""
    signed = rule_named(rule).signed
    params = [weights(300, dtype), weights(70, dtype).view(7, 10)]
    grads = [weights(300, dtype, seed=1), weights(70, seed=2).view(7, 10)]
    numbers = torch.tensor(hyper(lr=0.1, beta1=0.9, beta2=0.99, beta3=0.999, alpha=2.0, eps=1e-8, step=2))
    if bits == 32:
        return (params, grads, [p.float() * 0.1 for p in params for _ in signed], numbers, rule), named
    states = [torch.full(p.shape, 130, dtype=torch.uint8) for p in params for _ in signed]
    absmax = [torch.full((-(-p.numel() // 256),), 0.1) for p in params for _ in signed]
    maps = [F.create_dynamic_map(one) for one in signed]
    return (params, grads, states, absmax, maps, numbers, 256, rule), named


CALLS: dict[str, Callable[[torch.dtype], list[Call]]] = {
    "quantize_4bit": lambda d: [
        ((weights(N * K, d).view(N, K), BLOCK, "nf4", torch.uint8), {}),
        ((weights(65, d), BLOCK, "fp4", torch.uint8), {}),
        ((weights(512, d), 4096, "nf4", torch.bfloat16), {}),
        ((weights(0, d), BLOCK, "nf4", torch.uint8), {}),
    ],
    "dequantize_4bit": lambda d: [_dequantize(d, False), _dequantize(d, True)],
    "dequantize_4bit.out": lambda d: [
        _dequantize(d, False, out=torch.zeros(N, K, dtype=d)),
        _dequantize(d, True, out=torch.zeros(N, K, dtype=d)),
    ],
    "embedding_4bit": lambda d: [_embedding(d, False), _embedding(d, True)],
    "gemm_4bit": lambda d: [_gemm(d, False), _gemm(d, True)],
    "gemm_4bit_dgrad": lambda d: [_dgrad(d, False), _dgrad(d, True)],
    "gemm_4bit_grouped": lambda d: [_grouped(d, False, False), _grouped(d, True, True)],
    "group_rows": lambda _: [((torch.tensor([[0, 2], [5, 1]]), 3), {})],
    "gemv_4bit": lambda d: [_gemv(d)],
    "gemv_4bit.out": lambda d: [_gemv(d, out=torch.zeros(1, N, dtype=d))],
    "quantize_blockwise": lambda d: [_quantize_blockwise(d)],
    "quantize_blockwise.out": lambda d: [
        _quantize_blockwise(d, out=torch.zeros(5, 70, dtype=torch.uint8), absmax=torch.zeros(6))
    ],
    "dequantize_blockwise": lambda d: [_dequantize_blockwise(d)],
    "dequantize_blockwise.out": lambda d: [_dequantize_blockwise(d, out=torch.zeros(5, 70, dtype=d))],
    "optimizer_step_32bit": lambda d: [_step(d, 32, "adam"), _step(d, 32, "lion", skip_zeros=True)],
    "optimizer_step_8bit": lambda d: [_step(d, 8, "ademamix"), _step(d, 8, "momentum", seed=7)],
    "optimizer_update_norm": lambda d: [_step(d, 32, "adam")],
}


def test_every_four_bit_blockwise_and_optimizer_op_is_checked_here() -> None:
    here = ("_4bit", "_blockwise", "optimizer_", "group_rows")
    assert {name for name in defined_ops() if any(part in name for part in here)} == set(CALLS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    op, _, overload = name.partition(".")
    for args, kwargs in CALLS[name](dtype):
        torch.library.opcheck(getattr(getattr(ops, op), overload or "default"), args, kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_results_never_alias_their_inputs(name: str, dtype: torch.dtype) -> None:
    op, _, overload = name.partition(".")
    for args, kwargs in CALLS[name](dtype):
        results = getattr(getattr(ops, op), overload or "default")(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor) and t.numel()}
        for result in results if isinstance(results, tuple) else (results,):
            assert result is None or result.numel() == 0 or result.untyped_storage().data_ptr() not in given
