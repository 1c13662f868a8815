"""What int8 plans launch when a call is repeated: the same kernels with the same arguments as the ordinary call."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import torch

from halfbyte.backends.triton import int8, int8_plan
from halfbyte.backends.triton.device import Gpu
from halfbyte.backends.triton.int8_plan import make_plan
from halfbyte.errors import ArgumentError
from tests.backends.triton.noting import Seen, compile_all, compile_on_launch, one_gpu

N, K = 64, 256


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    one_gpu(monkeypatch)
    monkeypatch.setattr(int8_plan, "gpu_of", lambda index: Gpu("sm_90", 132, 50 << 20, gluon=True))  # noqa: ARG005
    monkeypatch.setattr(int8_plan, "GATHERED_WORK", 512 * N * K)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("rows", [1, 3, 64, 300, 512])
def test_a_repeated_call_launches_what_the_ordinary_one_does(rows: int, threshold: float, bias: bool) -> None:
    dtype = torch.bfloat16
    x, out = torch.zeros(rows, K, dtype=dtype), torch.zeros(rows, N, dtype=dtype)
    codes, scales, added = torch.zeros(N, K, dtype=torch.int8), torch.zeros(N), torch.zeros(N) if bias else None
    plan = make_plan(rows, N, K, K, dtype, 0, split=threshold > 0, full=False, bias=bias)
    assert plan.repeated(codes, scales, threshold, added, (rows, N)) is None
    seen: Seen = []
    compile_all(plan, seen)
    plan.run(x, codes, scales, threshold, added, None, out)
    ordinary, seen[:] = list(seen), []
    call = plan.repeated(codes, scales, threshold, added, (2, rows, N))
    assert call is not None
    found = call(x)
    assert found is not None
    assert (found.shape, found.dtype) == ((2, rows, N), dtype)
    assert len(seen) == (1 if rows == 1 else 4 if rows == 512 and threshold else 2)
    assert [(name, grid) for name, grid, _ in seen] == [(name, grid) for name, grid, _ in ordinary]
    fixed = {x.data_ptr(), codes.data_ptr(), scales.data_ptr(), added.data_ptr() if bias else None}
    for (_, _, mine), (_, _, theirs) in zip(seen, ordinary, strict=True):
        assert [name for name in mine if mine[name] is None] == [name for name in theirs if theirs[name] is None]
        for name, value in theirs.items():
            assert mine[name] == value or (value > 1 << 20 and value not in fixed), name
    assert seen[-1][2]["out"] == found.data_ptr()
    between, before = places(seen), places(ordinary)
    assert [place - between[0] for place in between] == [place - before[0] for place in before]


def places(seen: Seen) -> list[int]:
    """Addresses of what lies between the kernels."""
    names = ("words", "codes", "absmax", "row_absmax", "apart_x", "apart_weight", "count")
    return [given[name] for _, _, given in seen for name in names if given.get(name) is not None]


def test_misaligned_activations_are_left_to_the_ordinary_call() -> None:
    for rows in (1, 3):
        plan = make_plan(rows, N, K, K, torch.bfloat16, 0, split=True, full=False, bias=False)
        seen: Seen = []
        compile_all(plan, seen)
        call = plan.repeated(torch.zeros(N, K, dtype=torch.int8), torch.zeros(N), 6.0, None, (rows, N))
        assert call is not None
        assert call(torch.zeros(rows * K + 1, dtype=torch.bfloat16)[1:].view(rows, K)) is None
        assert seen == []


@pytest.mark.parametrize("away", ["CB", "SCB", "bias", "weight"])
def test_tensors_on_another_device_reach_no_kernel(away: str) -> None:
    tensors: dict[str, Any] = {"CB": torch.zeros(N, K, dtype=torch.int8), "SCB": torch.zeros(N)}
    tensors |= {"bias": torch.zeros(N), "weight": torch.zeros(N, K)}
    tensors[away] = tensors[away].to("meta")
    with pytest.raises(ArgumentError, match=r"8-bit layer is on meta(.*\n)*.*layer\.to\(device\)"):
        int8.int8_linear(torch.zeros(2, K), threshold=6.0, **tensors)


def test_a_second_gradient_starts_the_compiled_kernel_on_the_same_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = compile_on_launch(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(int8, "_dequantizers", {})
    codes, scales = torch.zeros(N, K, dtype=torch.int8), torch.zeros(N)
    for _ in range(2):  # the first compiles
        assert int8.int8_linear_dgrad(torch.zeros(2, 3, N), codes, scales).shape == (2, 3, K)
    ((name, grid, given),) = seen
    assert (name, grid) == ("_int8_dequantize_kernel", (-(-N // given["BR"]), -(-K // given["BC"]), 1))
    assert (given["weight"], given["absmax"]) == (codes.data_ptr(), scales.data_ptr())
    assert [given[name] for name in ("N", "K", "first", "columns")] == [N, K, 0, K]
