"""The kernels of AVX-512 and AMX, run without either: every instruction of theirs stands in plain IR."""

import ctypes
import dataclasses
import mmap
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from halfbyte.backends.cpu import blockwise, call, compiler, four_bit, fused, host, tiled
from halfbyte.backends.cpu import matmul as cpu
from halfbyte.backends.cpu.kernels.level import Level
from halfbyte.backends.reference import blockwise as reference8
from halfbyte.backends.reference import four_bit as reference
from halfbyte.formats import codebook_names
from halfbyte.formats.dynamic import dynamic_map
from tests.backends.cpu.emulated_x86 import EmulatedEmitter
from tests.backends.cpu.test_matmul import check
from tests.backends.cpu.test_optimizer import check as check_steps
from tests.backends.cpu.test_optimizer import check_scales
from tests.support.hard_inputs import weights

NAMES = ("amx", "avx512bf16", "avx512")

pytestmark = pytest.mark.skipif(
    all(level.name != "avx2" for level in host.levels()), reason="emulated with AVX2, which this machine lacks"
)


@pytest.fixture(scope="module")
def levels() -> dict[str, Level]:
    """The levels under names of their own, compiled for AVX2: the same ones for all tests, so that kernels are kept."""
    return {
        name: dataclasses.replace(
            host.level_named(name), name=f"emulated_{name}", cpu=host.level_named("avx2").cpu, features=""
        )
        for name in NAMES
    }


@pytest.fixture
def emulated(
    levels: dict[str, Level], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], None]]:
    """``emulated("amx")``: kernels of that level from here on."""
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "emulated"))
    compiler.cache_directory.cache_clear()
    monkeypatch.setattr(call, "Emitter", EmulatedEmitter)
    yield lambda name: monkeypatch.setattr(host, "level", lambda: levels[name])
    monkeypatch.undo()
    compiler.cache_directory.cache_clear()


@pytest.mark.parametrize("batch", [1, 3, 4, 16, 17, 33, 70])
def test_tiles_and_rows_of_any_batch(emulated: Callable[[str], None], batch: int) -> None:
    emulated("amx")
    check(batch, 50, 192, torch.bfloat16)
    check(batch, 50, 256, torch.bfloat16)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
def test_tiles_of_any_blocksize_plain_and_nested(emulated: Callable[[str], None], blocksize: int, double: bool) -> None:
    emulated("amx")
    for batch in (6, 40):
        check(batch, 37, 320, torch.bfloat16, blocksize, double=double)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize(("name", "dtype"), [("avx512", torch.float32), ("avx512bf16", torch.bfloat16)])
def test_rows_of_any_blocksize_plain_and_nested(
    emulated: Callable[[str], None], name: str, dtype: torch.dtype, blocksize: int, double: bool
) -> None:
    emulated(name)
    check(2, 37, 384, dtype, blocksize, double=double)


def before_a_wall(tensor: torch.Tensor) -> torch.Tensor:
    """A copy behind whose last byte memory may not be read."""
    inside = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = torch.frombuffer(mmap.mmap(-1, inside + mmap.PAGESIZE), dtype=torch.uint8)
    copy = memory[inside - tensor.nbytes : inside].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory.data_ptr() + inside), mmap.PAGESIZE, 0) == 0
    return copy


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize(
    ("name", "dtype", "batch", "rows"),
    [
        ("avx512", torch.float32, 1, 8),
        ("avx512bf16", torch.bfloat16, 1, 8),
        ("amx", torch.bfloat16, 5, 37),
        ("amx", torch.bfloat16, 21, 37),
    ],
)
def test_no_byte_is_read_beyond_the_last(
    emulated: Callable[[str], None], name: str, dtype: torch.dtype, batch: int, rows: int
) -> None:
    """Of activations, codes and scales. There the process would end, so another one tries it."""
    emulated(name)
    packed, absmax = reference.quantize_4bit(weights(rows * 256), 64, "nf4", torch.uint8)
    x = torch.randn(batch, 256).to(dtype)
    cpu.gemm_4bit(x, packed, (rows, 256), absmax, 64, "nf4")  # compiles
    x, packed, absmax = (before_a_wall(tensor) for tensor in (x, packed, absmax))
    child = os.fork()
    if not child:
        cpu.gemm_4bit(x, packed, (rows, 256), absmax, 64, "nf4")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_on_any_number_of_threads(
    emulated: Callable[[str], None], use_threads: Callable[[int], None], threads: int
) -> None:
    emulated("amx")
    use_threads(threads)
    for batch in (1, 3):
        check(batch, 300, 4096, torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 15, 16, 31, 33, 300])
def test_tiles_of_any_number_of_rows_and_threads(
    emulated: Callable[[str], None], use_threads: Callable[[int], None], rows: int
) -> None:
    emulated("amx")
    for threads in (1, 3):
        use_threads(threads)
        for batch in (7, 50):
            check(batch, rows, 704, torch.bfloat16)


def test_tiles_in_many_panels_and_pieces(emulated: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    emulated("amx")
    monkeypatch.setattr(tiled, "PANEL", 3)
    monkeypatch.setattr(tiled, "PANEL_MANY", 3)
    monkeypatch.setattr(tiled, "GROUP_ROWS", 64)
    cpu._planned.cache_clear()
    for batch in (9, 40):
        check(batch, 200, 704, torch.bfloat16)
    cpu._planned.cache_clear()


def test_one_hot_activations_read_single_weights_through_tiles(emulated: Callable[[str], None]) -> None:
    """Every place of a tile finds its own element, for every codebook."""
    emulated("amx")
    for kind in codebook_names(4):
        packed, absmax = reference.quantize_4bit(weights(20 * 128), 32, kind, torch.uint8)
        weight = reference.dequantize_4bit(packed, absmax, 32, kind, (20, 128), torch.bfloat16)
        found = cpu.gemm_4bit(torch.eye(128).bfloat16(), packed, (20, 128), absmax, 32, kind)
        assert torch.equal(found.T, weight)


def test_strided_activations_and_a_bias_reach_tiles(emulated: Callable[[str], None]) -> None:
    emulated("amx")
    packed, absmax = reference.quantize_4bit(weights(40 * 128), 64, "nf4", torch.uint8)
    wide, bias = torch.randn(2, 9, 200).bfloat16(), torch.randn(80).bfloat16()[::2]
    x = wide[..., 7:135]
    out = cpu.gemm_4bit(x, packed, (40, 128), absmax, 64, "nf4", bias)
    assert torch.equal(out, cpu.gemm_4bit(x.contiguous(), packed, (40, 128), absmax, 64, "nf4", bias.contiguous()))
    assert torch.equal(out[:1], cpu.gemm_4bit(x[:1], packed, (40, 128), absmax, 64, "nf4", bias))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_spoiled_block_stays_in_its_row_of_a_tile(emulated: Callable[[str], None], value: float) -> None:
    emulated("amx")
    weight = weights(20 * 128).view(20, 128)
    weight[7, 90] = value
    packed, absmax = reference.quantize_4bit(weight, 64, "nf4", torch.uint8)
    for batch in (1, 5, 40):
        out = cpu.gemm_4bit(torch.randn(batch, 128).bfloat16(), packed, (20, 128), absmax, 64, "nf4")
        assert out[:, 7].isnan().all()
        assert out[:, [*range(7), *range(8, 20)]].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_references(emulated: Callable[[str], None], name: str) -> None:
    emulated(name)
    values = weights(1000)
    values[70], values[140] = float("nan"), 1e-39
    for kind in codebook_names(4):
        for found, expected in zip(
            four_bit.quantize_4bit(values, 64, kind, torch.uint8),
            reference.quantize_4bit(values, 64, kind, torch.uint8),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    code = torch.from_numpy(dynamic_map())
    for found, expected in zip(
        blockwise.quantize_blockwise(values, code, 64), reference8.quantize_blockwise(values, code, 64), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_matrix_unit_takes_bf16_from_four_activations_on(emulated: Callable[[str], None]) -> None:
    emulated("amx")
    assert tiled.takes(4, torch.bfloat16)
    assert not tiled.takes(3, torch.bfloat16)
    assert not tiled.takes(4, torch.float32)
    emulated("avx512")
    assert not tiled.takes(4, torch.bfloat16)


def test_rows_of_128_codes_take_up_to_three_activations(emulated: Callable[[str], None]) -> None:
    emulated("avx512")
    assert fused.takes_rows(3, 128)
    assert not fused.takes_rows(4, 128)
    assert not fused.takes_rows(1, 192)
    emulated("amx")
    assert fused.takes_rows(3, 4096)


@pytest.mark.parametrize("rule", ["adam", "ademamix", "lion", "rmsprop"])
@pytest.mark.parametrize("numel", [7, 256, 2 * 256 + 3, 70_001])
def test_optimizer_steps(
    emulated: Callable[[str], None], only_backend: Callable[[str], None], rule: str, numel: int
) -> None:
    emulated("avx512")
    check_scales(only_backend, rule)
    check_steps(only_backend, rule, numel, torch.float32, torch.bfloat16, 256, -1, False)
