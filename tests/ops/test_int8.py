"""LLM.int8() ops: opcheck, no aliases, and arguments that are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import halfbyte.functional as F
from halfbyte.errors import ArgumentError
from halfbyte.ops import defined_ops
from tests.support.hard_inputs import DTYPES
from tests.support.int8_inputs import THRESHOLD, activations, int8_weight

ops = torch.ops.halfbyte
M, N, K = 6, 24, 64

Call = tuple[tuple[Any, ...], dict[str, Any]]


def _steps(dtype: torch.dtype) -> dict[str, Any]:
    A = activations(M, K, dtype)
    CA, SCA, columns = F.int8_vectorwise_quant(A, THRESHOLD)
    CB, SCB = int8_weight(N, K)
    return {"A": A, "CA": CA, "SCA": SCA, "columns": columns, "CB": CB, "SCB": SCB, "bias": torch.ones(N, dtype=dtype)}


def _calls(dtype: torch.dtype) -> dict[str, list[Call]]:
    s = _steps(dtype)
    A, CA, SCA, CB, SCB, bias, columns = (s[k] for k in ("A", "CA", "SCA", "CB", "SCB", "bias", "columns"))
    sums = F.int8_linear_matmul(CA, CB)
    weight = (CB * SCB[:, None]).to(dtype)
    return {
        "int8_vectorwise_quant": [((A,), {}), ((A, THRESHOLD), {}), ((A, 1e9), {}), ((A.view(2, 3, K),), {})],
        "int8_double_quant": [((A,), {}), ((A, THRESHOLD), {})],
        "int8_vectorwise_dequant": [((CB, SCB), {})],
        "int8_linear_matmul": [((CA, CB), {}), ((CA.view(2, 3, K), CB), {})],
        "int8_linear_matmul.out": [((CA, CB), {"out": torch.zeros(M, N, dtype=torch.int32)})],
        "int8_mm_dequant": [((sums, SCA, SCB), {}), ((sums, SCA, SCB, dtype, bias), {})],
        "int8_scaled_mm": [((CA, CB, SCA, SCB), {}), ((CA, CB, SCA, SCB, bias, dtype), {})],
        "int8_mixed_scaled_mm": [((A, CA, CB, SCA, SCB), {}), ((A, CA, CB, SCA, SCB, columns, bias), {})],
        "int8_linear": [
            ((A, CB, SCB), {}),
            ((A, CB, SCB, THRESHOLD, bias), {}),
            ((A, CB, SCB, THRESHOLD, None, weight), {}),
            ((A.view(2, 3, K), CB, SCB, THRESHOLD), {}),
            ((A[:0], CB, SCB, THRESHOLD), {}),
        ],
        "int8_linear_dgrad": [((torch.randn(2, 3, N, dtype=dtype), CB, SCB), {})],
    }


NAMES = sorted(_calls(torch.float32))


def test_every_int8_op_is_checked_here() -> None:
    assert [name for name in defined_ops() if name.startswith("int8_")] == NAMES


def _op(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(ops, base), overload or "default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    for args, kwargs in _calls(dtype)[name]:
        torch.library.opcheck(_op(name), args, kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_results_never_alias_their_inputs_or_change_them(name: str) -> None:
    for args, kwargs in _calls(torch.float32)[name]:
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        before = [t.clone() for t in tensors]
        results = _op(name)(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        for result in results if isinstance(results, tuple) else (results,):
            assert result is None or result.numel() == 0 or result.untyped_storage().data_ptr() not in given
        assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))


CB, SCB = int8_weight(N, K)
X = torch.zeros(2, K)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an fp64 activation": (lambda: ops.int8_linear(X.double(), CB, SCB), "activation is torch.float64"),
    "an int32 weight": (lambda: ops.int8_linear(X, CB.int(), SCB), "the weight is torch.int32; expected int8"),
    "a flat weight": (lambda: ops.int8_linear(X, CB.view(-1), SCB), r"shape \(1536,\); expected 2 dimensions"),
    "bf16 scales": (lambda: ops.int8_linear(X, CB, SCB.bfloat16()), "SCB is torch.bfloat16 with 24 values"),
    "too few scales": (lambda: ops.int8_linear(X, CB, SCB[1:]), "23 values; expected float32 with 24"),
    "another K": (lambda: ops.int8_linear(X[:, 1:], CB, SCB), r"\(2, 63\) and \(24, 64\) do not multiply"),
    "a negative threshold": (lambda: ops.int8_linear(X, CB, SCB, -1.0), "threshold is -1.0"),
    "a threshold that is NaN": (lambda: F.int8_vectorwise_quant(X, float("nan")), "threshold is nan"),
    "a bias of another length": (lambda: ops.int8_linear(X, CB, SCB, 0.0, SCB[1:]), r"\(23,\); expected \(24,\)"),
    "an unquantized weight of another shape": (
        lambda: ops.int8_linear(X, CB, SCB, 6.0, None, torch.zeros(K, N)),
        r"shape \(64, 24\); expected floating point of shape \(24, 64\)",
    ),
    "an integer activation": (lambda: F.int8_vectorwise_quant(CB), "tensor to quantize is torch.int8"),
    "a scalar": (lambda: F.int8_vectorwise_quant(torch.tensor(1.0)), "is a scalar"),
    "float codes": (lambda: F.int8_vectorwise_dequant(X, SCB[:2]), "A is torch.float32; expected int8"),
    "another sum dtype": (lambda: F.int8_linear_matmul(CB, CB, dtype=torch.float32), "expected torch.int32"),
    "an out of another dtype": (lambda: F.int8_linear_matmul(CB, CB, out=torch.zeros(N, N)), "out is torch.float32"),
    "float sums": (lambda: ops.int8_mm_dequant(X, SCB[:2], X[0]), "A is torch.float32; expected int32"),
    "outlier columns as int32": (
        lambda: F.int8_mixed_scaled_mm(X, CB[:2], CB, SCB[:2], SCB, torch.zeros(1, dtype=torch.int32)),
        "outlier_cols is torch.int32",
    ),
    "a gradient of another length": (lambda: ops.int8_linear_dgrad(X, CB, SCB), "expected 24 as the first one's"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_value_and_what_was_expected(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        call()


def test_given_outputs_are_filled() -> None:
    s = _steps(torch.float32)
    sums = F.int8_linear_matmul(s["CA"], s["CB"])
    out = torch.empty(M, N, dtype=torch.bfloat16)
    assert F.int8_mm_dequant(sums, s["SCA"], s["SCB"], out=out) is out
    assert torch.equal(out, ops.int8_mm_dequant(sums, s["SCA"], s["SCB"], torch.bfloat16))
    assert F.int8_mm_dequant(sums, s["SCA"], s["SCB"]).dtype == torch.float16
    made = F.int8_double_quant(s["A"])
    given = [torch.empty_like(made[i]) for i in (3, 2, 1, 0)]
    F.int8_double_quant(s["A"], *given)
    assert all(torch.equal(given[i], made[3 - i]) for i in range(4))


def test_compiles_without_a_graph_break() -> None:
    s = _steps(torch.float32)

    def step(A: torch.Tensor) -> torch.Tensor:
        return ops.int8_linear(A.relu(), s["CB"], s["SCB"], THRESHOLD, s["bias"])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 3, 5):
        assert torch.equal(compiled(s["A"][:rows]), step(s["A"][:rows]))
