"""The int8 kernels: under Triton's interpreter what the reference computes; compiled for every architecture, no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from halfbyte.backends.triton.device import Gpu
from halfbyte.backends.triton.int8_plan import GATHERED_FROM, GATHERED_WORK
from halfbyte.backends.triton.int8_tuning import Entry, Tile, closed_form, read, tile_for
from halfbyte.backends.triton.kernels import int8 as kernels
from halfbyte.backends.triton.kernels.int8_product import _int8_product_kernel
from halfbyte.backends.triton.kernels.int8_row import _int8_row_kernel
from halfbyte.formats.int8 import STEP
from tests.backends.triton.compiling import Built, build

CASES = ("rows", "gather", "sums", "product", "row", "dequantize", "huge")
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_120", "gfx942")
ALIGNED = ("K", "K4", "N", "x_stride", "first", "columns")
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_120": 99 << 10}
OPTIONAL = ("bias", "x", "full", "words", "apart_x", "apart_weight", "count")
ROWS_OF_CODES = (4096, 14336)
MANY = (16, 64, 512, 2048)


def gpu(target: str) -> Gpu:
    return Gpu(target, 132, 50 << 20, gluon=True)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, list[str]]:
    """Mismatches per case, from one child: the interpreter is chosen when Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("interpreted_int8.py")
    child = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=800, check=False
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_interpreted_kernel_agrees_with_the_reference(case: str, verdicts: dict[str, list[str]]) -> None:
    assert verdicts[case] == []


def product(target: str, tile: Tile, dtype: str = "bf16", full: bool = False, gathered: bool = True) -> Built:
    types = {
        "codes": "*i8", "weight": "*i8", "out": f"*{dtype}", "bias": f"*{dtype}", "row_absmax": "*fp32",
        "column_absmax": "*fp32", "threshold": "fp32", "M": "i32", "N": "i32", "K": "i32", "x_stride": "i32",
        "x": f"*{dtype}", "words": "*i32",
    }  # fmt: skip
    if full:
        types["full"] = f"*{dtype}"
    if gathered:
        types |= {"apart_x": f"*{dtype}", "apart_weight": f"*{dtype}", "count": "*i32"}
    constants: dict[str, Any] = {name: None for name in OPTIONAL if name not in types}
    constants |= {
        "STEP": STEP, "BM": tile.m, "BN": tile.n, "BK": tile.k, "BO": 16,
        "GROUP": tile.group, "CAPACITY": 64 if gathered else 0, "WORDS": 128, "RAW": False, "SPLIT": True,
        "FULL": full, "BIAS": True,
    }  # fmt: skip
    options: dict[str, Any] = {"warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    return build(_int8_product_kernel, types, constants | {"EVEN": True}, target=target, aligned=ALIGNED, **options)


def row(target: str, tile: Tile, k: int, dtype: str = "bf16") -> Built:
    types = {
        "x": f"*{dtype}", "weight": "*i32", "out": f"*{dtype}", "bias": f"*{dtype}", "column_absmax": "*fp32",
        "threshold": "fp32", "N": "i32", "K4": "i32",
    }  # fmt: skip
    words = 1 << (k // 4 - 1).bit_length()
    constants = {
        "STEP": STEP, "BN": tile.n, "WORDS": words, "PLANES": 4 if dtype == "fp32" else 3,
        "ASM": target.startswith("sm_"), "EVEN": words * 4 == k, "SPLIT": True, "BIAS": True, "PROGRAMS": 132,
    }  # fmt: skip
    return build(
        _int8_row_kernel, types, constants, target=target, warps=tile.warps, aligned=ALIGNED, enable_fp_fusion=False
    )


@pytest.mark.parametrize("batch", MANY)
@pytest.mark.parametrize("target", TARGETS)
def test_products_of_many_rows_take_tensor_cores_and_fit_into_shared_memory(target: str, batch: int) -> None:
    built = product(target, closed_form(gpu(target), batch, 4096, 4096), gathered=batch >= 256)
    if target == "gfx942":
        assert "mfma_i32" in built.asm["amdgcn"]
    else:
        assert "s32.s8.s8" in built.asm["ptx"]
        assert 0 < built.shared <= SHARED[target]


@pytest.mark.parametrize("k", ROWS_OF_CODES)
@pytest.mark.parametrize("target", TARGETS)
def test_products_of_one_row_load_16_bytes_and_multiply_four_codes_at_once(target: str, k: int) -> None:
    built = row(target, closed_form(gpu(target), 1, 4096, k), k)
    if target != "gfx942":
        assert "dp4a.s32.s32" in built.asm["ptx"]
        assert "v4.b32" in built.asm["ptx"]
        assert built.registers_spilled == 0


def gathered(entry: Entry) -> bool:
    return entry.batch >= GATHERED_FROM and entry.batch * entry.n * entry.k >= GATHERED_WORK


@pytest.mark.parametrize("tile", dict.fromkeys((e.tile, e.k, gathered(e)) for e in read("sm_90")), ids=str)
def test_measured_tiles_fit(tile: tuple[Tile, int, bool]) -> None:
    kind, k, apart = tile
    built = row("sm_90", kind, k) if kind.kind == "row" else product("sm_90", kind, gathered=apart)
    assert built.shared <= SHARED["sm_90"]
    # Addresses of the outliers' part, outside the loop; the widest tile was the fastest with them.
    assert built.registers_spilled <= (64 if kind.m * kind.n < 128 * 256 else 192)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("full", [False, True])
def test_products_compile_for_every_dtype(dtype: str, full: bool) -> None:
    tile = Tile("pointer", 64, 64, 128, 8, 4, 3)
    assert "s32.s8.s8" in product("sm_80", tile, dtype, full, gathered=not full).asm["ptx"]
    assert "dp4a" in row("sm_80", Tile("row", 1, 8, 64, 1, 4, 2), 4096, dtype).asm["ptx"]


def test_hopper_multiplies_whole_warp_groups() -> None:
    built = product("sm_90", Tile("pointer", 128, 128, 128, 8, 4, 3))
    assert "wgmma.mma_async" in built.asm["ptx"]
    assert built.registers_spilled == 0


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_quantization_compiles_without_contracting_its_rounding(target: str, shared: bool, split: bool) -> None:
    types = {
        "x": "*bf16", "codes": "*i8", "absmax": "*fp32", "words": "*i32", "threshold": "fp32", "K": "i32",
        "x_stride": "i32",
    }  # fmt: skip
    constants = {"SPLIT": split, "SHARED": shared, "BLOCK": 4096}
    text = build(
        kernels._int8_rows_kernel, types, constants, target=target, warps=8, aligned=ALIGNED, enable_fp_fusion=False
    ).asm
    if target != "gfx942":
        assert "div.rn.f32" in text["ptx"]
        assert "fma.rn.f32" not in text["ptx"]


@pytest.mark.parametrize("target", TARGETS)
def test_gathering_and_dequantizing_compile(target: str) -> None:
    types = {
        "words": "*i32", "x": "*bf16", "weight": "*i8", "apart_x": "*bf16", "apart_weight": "*bf16", "count": "*i32",
        "threshold": "fp32", "M": "i32", "N": "i32", "K": "i32", "x_stride": "i32",
    }  # fmt: skip
    constants = {"CAPACITY": 64, "WORDS": 128, "BR": 64, "BO": 16}
    build(kernels._int8_gather_kernel, types, constants, target=target, aligned=ALIGNED)
    types = {
        "weight": "*i8", "absmax": "*fp32", "out": "*bf16", "N": "i32", "K": "i32", "first": "i32", "columns": "i32",
    }  # fmt: skip
    build(
        kernels._int8_dequantize_kernel,
        types,
        {"STEP": STEP, "BR": 16, "BC": 512},
        target=target,
        aligned=ALIGNED,
    )


def test_an_unknown_gpu_gets_tiles_by_rule_for_any_batch_and_shape() -> None:
    for batch in (1, 3, 5, 16, 17, 100, 300, 5000):
        for n, k in ((1, 1), (100, 48), (4096, 4096), (50000, 8192)):
            tile = tile_for(gpu("sm_87"), batch, n, k)
            assert tile.kind == ("row" if batch == 1 and k % 16 == 0 else "pointer")


def test_shapes_far_from_all_measured_ones_get_the_rule() -> None:
    assert tile_for(gpu("sm_90"), 16, 3, 7) == closed_form(gpu("sm_90"), 16, 3, 7)
