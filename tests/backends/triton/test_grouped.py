"""The experts' kernels: plain Triton under the interpreter, Gluon compiled without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from halfbyte.backends.triton import grouped_tiles
from halfbyte.backends.triton.device import Gpu
from halfbyte.backends.triton.grouped import tile_bound
from halfbyte.backends.triton.kernels import gemm_grouped
from tests.backends.triton.compiling import build

TYPES = {
    **dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("order", "ends", "pairs"), "*i32"),
    **dict.fromkeys(("absmax", "absmax_code", "absmax_offset"), "*fp32"),
    **dict.fromkeys(("w_ptr", "absmax_8bit"), "*u8"),
    **dict.fromkeys(("S", "E", "repeat", "N", "row_words", "row_blocks", "x_stride", "groups", "per_slice"), "i32"),
}
SMALL = {"EP": 256, "BN": 16, "BM": 8, "J": 2, "U": 4, "CHAIN": 1, "BLOCK_GROUPS": 1, "KW": 4, "NW": 1, "EVEN": True}
SMALL |= {"NESTED": False, "BIAS": False, "AHEAD": 1, "HALVES": False}
ALIGNED = ("N", "row_words", "row_blocks", "x_stride", "groups", "per_slice")


@pytest.fixture(scope="module")
def verdicts() -> dict[str, list[str]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("interpreted_grouped.py")
    child = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=800)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["group", "product", "place"])
def test_the_interpreted_kernel_agrees_with_the_reference(case: str, verdicts: dict[str, list[str]]) -> None:
    assert verdicts[case] == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"NESTED": True, "BIAS": True},
        {"EVEN": False, "AHEAD": 0, "BM": 32, "U": 2},
        {"BN": 64, "NW": 4, "KW": 2, "CHAIN": 2, "BLOCK_GROUPS": 2},
        {"BN": 64, "NW": 4, "KW": 2, "BM": 32, "U": 2, "HALVES": True},
    ],
    ids=str,
)
def test_the_grouped_kernel_decodes_as_fast_as_the_small_batch_kernel(target: str, changes: dict[str, Any]) -> None:
    constants = {**SMALL, **changes}
    built = build(
        gemm_grouped._gemm_4bit_grouped_kernel, TYPES, constants, target=target,
        warps=constants["KW"] * constants["NW"], gluon=True, aligned=ALIGNED,
    )  # fmt: skip
    weights = constants["BN"] // constants["NW"] * 64 * constants["U"] / 32
    assert built.loop["LDS"] == weights / 2
    assert built.shared <= 16 << 10
    assert built.registers_spilled <= 64  # the second level's addresses, written and read once


@pytest.mark.parametrize("batch", [8, 16])
def test_no_routing_needs_more_tiles_than_are_launched(batch: int) -> None:
    for rows in range(40):
        for lonely in range(6):
            # The worst routing: one row for every expert but the last, which takes the rest; some rows have none.
            counts = [1] * min(lonely, rows) + [max(0, rows - lonely)]
            assert sum(-(-count // batch) for count in counts) <= tile_bound(rows, len(counts) - 1, batch)


HOPPER, OTHER = Gpu("sm_90", 132, 50 << 20, gluon=True), Gpu("sm_89", 128, 72 << 20, gluon=True)


def test_measured_tiles_are_taken_at_the_shapes_that_were_measured() -> None:
    entries = grouped_tiles.read("sm_90")
    assert len(entries) >= 12
    for entry in entries:
        assert grouped_tiles.tile_for(HOPPER, int(entry.rows_each * 128), 128, entry.k) == entry.tile
    assert grouped_tiles.read("sm_89") == ()


@pytest.mark.parametrize("gpu", [HOPPER, OTHER], ids=["measured", "by rule"])
@pytest.mark.parametrize("k", [64, 128, 192, 768, 2880, 7168, 28672])
@pytest.mark.parametrize("rows", [1, 16, 300, 5000, 100_000])
def test_every_shape_gets_a_tile_that_the_kernel_takes(gpu: Gpu, k: int, rows: int) -> None:
    tile = grouped_tiles.tile_for(gpu, rows, 32, k)
    assert tile.rows % (16 * tile.n_warps) == 0
    assert tile.batch in (8, 16, 32)
    assert 4 <= tile.k_warps * tile.n_warps <= 8
    # Accumulators of a warp: two registers for each of its 16-row tiles and 8 rows of activations, and as many again.
    assert tile.rows // (16 * tile.n_warps) * tile.batch // 8 <= 4
