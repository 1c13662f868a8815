"""The int8 kernels: under Triton's interpreter what the reference computes; compiled for every architecture, no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from halfbyte.backends.triton.int8 import tile_for
from halfbyte.backends.triton.kernels import int8 as kernels
from halfbyte.formats.int8 import STEP, STEP_SQUARED
from tests.backends.triton.compiling import build

CASES = ("rows", "columns", "sums", "product")
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_120", "gfx942")
ALIGNED = ("K", "N", "x_stride")


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


def product(target: str, batch: int, dtype: str, split: bool, full: bool = False) -> Any:
    tile = tile_for(batch, dtype == "fp32")
    types = {
        "codes": "*i8", "weight": "*i8", "out": f"*{dtype}", "bias": f"*{dtype}", "row_absmax": "*fp32",
        "column_absmax": "*fp32", "threshold": "fp32", "M": "i32", "N": "i32", "K": "i32", "x_stride": "i32",
    }  # fmt: skip
    if split:
        types |= {"x": f"*{dtype}", "columns": "*i32", "count": "*i32"}
    if full:
        types["full"] = f"*{dtype}"
    names = ("x", "full", "columns", "count")
    constants: dict[str, Any] = {name: None for name in names if name not in types}
    constants |= {
        "STEP": STEP, "STEP_SQUARED": STEP_SQUARED, "BM": tile.m, "BN": tile.n, "BK": tile.k, "BO": 16,
        "GROUP": tile.group, "RAW": False, "SPLIT": split, "FULL": full, "BIAS": True,
    }  # fmt: skip
    shape = {"warps": tile.warps, "num_stages": tile.stages, "aligned": ALIGNED}
    return build(kernels._int8_product_kernel, types, constants, target=target, **shape)


@pytest.mark.parametrize("batch", [1, 64, 512, 4096])
@pytest.mark.parametrize("target", TARGETS)
def test_the_product_compiles_to_int8_tensor_cores(target: str, batch: int) -> None:
    text = product(target, batch, "bf16", split=True).asm
    if target == "gfx942":
        assert "mfma_i32" in text["amdgcn"]
    else:
        assert "s32.s8.s8" in text["ptx"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("full", [False, True])
def test_the_product_compiles_for_every_dtype(dtype: str, full: bool) -> None:
    assert "s32.s8.s8" in product("sm_80", 1, dtype, split=True, full=full).asm["ptx"]


@pytest.mark.parametrize("batch", [512, 4096])
def test_hopper_multiplies_whole_warp_groups(batch: int) -> None:
    assert "wgmma.mma_async" in product("sm_90", batch, "bf16", split=True).asm["ptx"]


@pytest.mark.parametrize("batch", [1, 64, 512, 4096])
@pytest.mark.parametrize(("target", "capacity"), [("sm_80", 163 << 10), ("sm_89", 99 << 10), ("sm_90", 227 << 10)])
def test_the_product_fits_into_shared_memory(target: str, capacity: int, batch: int) -> None:
    assert 0 < product(target, batch, "bf16", split=True).shared <= capacity


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_quantization_compiles_without_contracting_its_rounding(target: str, split: bool) -> None:
    types = {
        "x": "*bf16", "codes": "*i8", "absmax": "*fp32", "flags": "*i32", "threshold": "fp32", "K": "i32",
        "x_stride": "i32",
    }  # fmt: skip
    constants = {"SPLIT": split, "BLOCK": 4096}
    text = build(
        kernels._int8_rows_kernel, types, constants, target=target, warps=8, aligned=ALIGNED, enable_fp_fusion=False
    ).asm
    if target != "gfx942":
        assert "div.rn.f32" in text["ptx"]
        assert "fma.rn.f32" not in text["ptx"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_list_of_columns_compiles(target: str) -> None:
    types = {"flags": "*i32", "columns": "*i32", "count": "*i32", "K": "i32"}
    assert build(kernels._int8_columns_kernel, types, {"BLOCK": 1024}, target=target).shared < 48 << 10
