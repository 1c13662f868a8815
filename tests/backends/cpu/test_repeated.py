"""Products that are repeated with the same weight are the ordinary ones, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from halfbyte.backends import registry
from halfbyte.backends.cpu import fused, tiled, workspace
from halfbyte.backends.cpu import matmul as cpu
from halfbyte.backends.cpu.kernels.level import CHUNK
from halfbyte.backends.cpu.kernels.levels import Level
from halfbyte.backends.cpu.kernels.tiles import ordered_bytes
from halfbyte.backends.reference import four_bit as reference
from halfbyte.nn import Linear4bit
from tests.backends.cpu.nesting import nest
from tests.backends.cpu.test_emulated import emulated, levels  # noqa: F401  (fixtures)
from tests.support.hard_inputs import DTYPES, weights

ROWS, COLUMNS = 50, 256

OnTiles = tuple[tuple[object, ...], Tensor, Callable[[Tensor], Tensor]]
"""What gemm_4bit takes after the activations, activations, and what repeats their product."""


def arguments(blocksize: int = 64, double: bool = False, biased: torch.dtype | None = None) -> tuple[object, ...]:
    """What gemm_4bit takes after the activations."""
    packed, absmax = reference.quantize_4bit(weights(ROWS * COLUMNS), blocksize, "nf4", torch.uint8)
    scales = nest(absmax) if double else (absmax, None, None, None)
    bias = None if biased is None else torch.randn(ROWS).to(biased)
    return packed, [ROWS, COLUMNS], scales[0], blocksize, "nf4", bias, *scales[1:]


def repeated(x: Tensor, *weight: object) -> Callable[[Tensor], Tensor] | None:
    torch.ops.halfbyte.gemm_4bit(x, *weight)
    return registry.prepare("gemm_4bit", x, *weight)


def recorded_sizes(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[int]:
    """Bytes that a module's products ask for from now on."""
    sizes: list[int] = []

    def scratch(nbytes: int) -> int:
        sizes.append(nbytes)
        return workspace.scratch(nbytes)

    monkeypatch.setattr(module, "scratch", scratch)
    return sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.usefixtures("level")
def test_a_repeated_product_is_the_ordinary_one(blocksize: int, double: bool, dtype: torch.dtype) -> None:
    weight = arguments(blocksize, double, dtype)
    for batch in (1, 2, 3, 4):
        call = repeated(torch.randn(batch, COLUMNS).to(dtype), *weight)
        assert call is not None
        for _ in range(2):
            other = torch.randn(batch, COLUMNS).to(dtype)
            assert torch.equal(call(other), cpu.gemm_4bit(other, *weight))


def test_the_result_has_the_activations_leading_dimensions() -> None:
    x, weight = torch.randn(2, 1, COLUMNS), arguments()
    call = repeated(x, *weight)
    assert call is not None
    assert torch.equal(call(x), cpu.gemm_4bit(x, *weight))


@pytest.fixture
def prepared_for_one_thread(
    emulated: Callable[[str], None],  # noqa: F811
    use_threads: Callable[[int], None],
) -> Callable[[int], OnTiles]:
    """Prepares a product of so many activations by the emulated matrix unit."""

    def prepare(batch: int) -> OnTiles:
        emulated("amx")
        use_threads(1)
        weight, x = arguments(), torch.randn(batch, COLUMNS).bfloat16()
        call = repeated(x, *weight)
        assert call is not None
        return weight, x, call

    return prepare


@pytest.mark.parametrize(
    ("module", "batch", "shared_tiles", "own_bytes"),
    [
        (fused, 1, 0, COLUMNS * 4),
        (fused, 3, 0, 3 * COLUMNS * 4),
        (tiled, 6, 0, ordered_bytes(1, COLUMNS // CHUNK)),
        (tiled, 40, 3, 0),
    ],
)
def test_products_have_memory_for_each_thread_of_the_call(
    prepared_for_one_thread: Callable[[int], OnTiles],
    use_threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    batch: int,
    shared_tiles: int,
    own_bytes: int,
) -> None:
    """Also where they were prepared for fewer threads: few activations are put into order by each for itself."""
    weight, x, call = prepared_for_one_thread(batch)
    sizes = recorded_sizes(monkeypatch, module)
    alone = call(x)
    use_threads(4)
    assert torch.equal(call(x), alone)
    assert torch.equal(cpu.gemm_4bit(x, *weight), alone)
    one, four, ordinary = (size - ordered_bytes(shared_tiles, COLUMNS // CHUNK) for size in sizes)
    assert four == ordinary == 4 * one
    assert one >= own_bytes


def test_what_would_need_a_copy_is_not_repeated() -> None:
    x = torch.randn(2, COLUMNS)
    strided = (*arguments()[:5], torch.randn(2 * ROWS)[::2], None, None, None)
    nested = list(arguments(double=True))
    offset = nested[-1]
    assert isinstance(offset, Tensor)
    for weight in (strided, (*nested[:-1], offset.half())):
        assert repeated(x, *weight) is None


@pytest.mark.usefixtures("level")
def test_products_by_slices_are_not_repeated() -> None:
    assert repeated(torch.randn(200, COLUMNS), *arguments()) is None


def test_a_layer_repeats_its_products(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call does not come to the backend's op."""
    del level
    asked: list[torch.Size] = []
    ordinary = cpu._product

    def product(A: Tensor, *rest: object) -> None:
        asked.append(A.shape)
        ordinary(A, *rest)

    monkeypatch.setattr(cpu, "_product", product)
    layer, x = Linear4bit(COLUMNS, ROWS, True, torch.float32, True, "nf4").to("cpu"), torch.randn(1, COLUMNS)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
    assert asked == [x.shape]
