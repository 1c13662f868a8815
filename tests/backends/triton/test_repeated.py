"""What 4-bit plans launch when a call is repeated: the same kernels with the same arguments as the ordinary call."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

from halfbyte.backends.triton import dequantize, gemm, slices
from halfbyte.backends.triton.decoded import DecodedPlan
from halfbyte.backends.triton.device import words_of
from halfbyte.backends.triton.fused import FusedPlan
from halfbyte.backends.triton.tuning import Tile
from tests.backends.triton.noting import Seen, compile_all, compile_on_launch, one_gpu

N, K = 256, 1024
DTYPE = torch.bfloat16
TILES = {
    "register": Tile("register", 8, 16, 4, 4, 1, 1, 1),
    "staged, split": Tile("staged", 32, 64, 2, 1, 4, 2, 3, table=False),
    "decoded": Tile("decoded", 32, 128, 2, 1, 4, 1, 6, table=False, producers=2),
    "decoded, split": Tile("decoded", 32, 128, 2, 1, 4, 2, 6, table=False, producers=2),
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    one_gpu(monkeypatch)


def plan_of(tile: Tile, m: int, *, across: bool = False, nested: bool = False, bias: bool = False) -> Any:
    if tile.kind == "decoded":
        return DecodedPlan(m, N, K, 64, "nf4", tile, across=across, nested=nested, bias=bias)
    return FusedPlan(m, N, K, 64, torch.zeros(512), words_of("nf4", DTYPE), tile, K, nested=nested, bias=bias)


def scales(nested: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """absmax of N x K in blocks of 64, and what decodes it."""
    count = N * K // 64
    if not nested:
        return torch.zeros(count), (None, None, None)
    return torch.zeros(-(-count // 256)), (
        torch.zeros(count, dtype=torch.uint8), torch.zeros(256), torch.zeros(())
    )  # fmt: skip


def plain(value: Any) -> Any:
    """A launch's argument as one that can be compared: a descriptor is what it describes."""
    base = getattr(value, "base", None)
    return value if base is None else {**vars(value), "base": base.data_ptr()}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("name", "across"), [*((name, False) for name in TILES), ("decoded", True), ("decoded, split", True)]
)
def test_a_repeated_call_launches_what_the_ordinary_one_does(name: str, across: bool, nested: bool) -> None:
    tile, m, bias = TILES[name], 8, not across
    terms, width = (N, K) if across else (K, N)
    plan = plan_of(tile, m, across=across, nested=nested, bias=bias)
    x, out = torch.zeros(m, terms, dtype=DTYPE), torch.zeros(m, width, dtype=DTYPE)
    packed, added = torch.zeros(N * K // 2, dtype=torch.uint8), torch.zeros(width, dtype=DTYPE) if bias else None
    absmax, rest = scales(nested)
    assert plan.repeated(packed, absmax, rest, added, (m, width), 0) is None
    seen: Seen = []
    compile_all(plan, seen)
    plan.run(x, packed, absmax, rest, added, out, 0)
    ordinary, seen[:] = list(seen), []
    call = plan.repeated(packed, absmax, rest, added, (2, m // 2, width), 0)
    for other in (x, torch.zeros_like(x)):  # what is found out at the first is kept for others
        seen.clear()
        found = call(other)
        assert (found.shape, found.dtype) == ((2, m // 2, width), DTYPE)
        assert [launch[:2] for launch in seen] == [launch[:2] for launch in ordinary]
        assert len(seen) == 1 + (tile.split > 1)
        for (_, _, mine), (_, _, theirs) in zip(seen, ordinary, strict=True):
            own = {"out", "out_ptr", "partial"} | ({"x_ptr", "x_desc"} if other is not x else set())
            assert {key: plain(mine[key]) for key in mine if key not in own} == {
                key: plain(theirs[key]) for key in theirs if key not in own
            }
        first, last = seen[0][2], seen[-1][2]
        assert (first["x_desc"].base.data_ptr() if "x_desc" in first else first["x_ptr"]) == other.data_ptr()
        assert last["out" if tile.split > 1 else "out_ptr"] == found.data_ptr()
        assert tile.split == 1 or last["partial"] == first["out_ptr"]


@pytest.mark.parametrize("name", TILES)
def test_misaligned_activations_are_left_to_the_ordinary_call(name: str) -> None:
    plan = plan_of(TILES[name], 8)
    seen: Seen = []
    compile_all(plan, seen)
    call = plan.repeated(torch.zeros(N * K // 2, dtype=torch.uint8), *scales(False), None, (8, N), 0)
    assert call(torch.zeros(8 * K + 1, dtype=DTYPE)[1:].view(8, K)) is None
    assert seen == []


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_a_repeated_product_of_many_rows_dequantizes_as_the_ordinary_one(
    across: bool, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, pairs = compile_on_launch(monkeypatch), torch.zeros(512)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(dequantize, "_launchers", {})
    for module in (dequantize, slices):
        monkeypatch.setattr(module, "pairs_of", lambda kind, index: pairs)  # noqa: ARG005
    x, out = torch.zeros(8, N if across else K), torch.empty(8, K if across else N)
    packed, (absmax, rest) = torch.zeros(N * K // 2, dtype=torch.uint8), scales(nested)
    fixed: Any = (packed, absmax, rest, 64, "nf4")
    assert slices.repeated(*fixed, (N, K), x.dtype, across=across) is None
    for _ in range(2):  # the first compiles
        if across:
            slices.backward(x, *fixed, out)
        else:
            slices.forward(x, *fixed, None, out)
    call = slices.repeated(*fixed, (N, K), x.dtype, across=across)
    assert call is not None
    assert call(x).shape == out.shape
    (name, grid, theirs), (again, same, mine) = seen
    assert (again, same) == (name, grid)
    del mine["out"], theirs["out"]
    assert mine == theirs


def with_gaps(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


def misaligned(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[:1], tensor])[1:]


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2, 3, 4])
def test_tensors_that_ordinary_calls_copy_first_are_not_repeated(
    place: int, across: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(TILES["decoded"], 8, across=across, nested=True)
    compile_all(plan, [])
    x, packed = torch.zeros(8, N if across else K, dtype=DTYPE), torch.zeros(N * K // 2, dtype=torch.uint8)
    forward = gemm._key(x, packed, 8, N, K, K, 64, "nf4", True, False)
    absmax, rest = scales(nested=True)
    monkeypatch.setattr(gemm, "_plans", {forward: plan})
    monkeypatch.setattr(gemm, "_backward_plans", {gemm._backward_key(x, 8, N, K, 64, "nf4", rest[0]): plan})

    def prepared(*tensors: Any) -> Any:
        first, *scales = tensors
        if across:
            return gemm._prepare_dgrad(x, first, (N, K), scales[0], 64, "nf4", *scales[1:])
        return gemm._prepare(x, first, (N, K), scales[0], 64, "nf4", None, *scales[1:])

    good = [packed, absmax, *rest]
    assert prepared(*good) is not None
    for change in (with_gaps, misaligned) if place < 4 else (Tensor.half,):
        assert prepared(*good[:place], change(good[place]), *good[place + 1 :]) is None
