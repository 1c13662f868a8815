"""Every kernel compiles for every architecture without a GPU; hot loops stay within their instruction budgets."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from halfbyte.backends.triton.decoded import registers
from halfbyte.backends.triton.kernels import (
    dequantize,
    gemm_decoded,
    gemm_portable,
    gemm_small_batch,
    gemm_staged,
    gemm_warpgroup,
)
from halfbyte.backends.triton.kernels import quantize as quantize_kernels
from halfbyte.backends.triton.tuning import Tile
from tests.backends.triton.compiling import build

counted = pytest.mark.skipif(
    triton.__version__.startswith("3.8."),
    reason="Triton 3.8 writes more instructions for these kernels than the releases before and after it",
)

POINTERS = {
    "w_ptr": "*u8",
    "absmax": "*fp32",
    "absmax_8bit": "*u8",
    "absmax_code": "*fp32",
    "absmax_offset": "*fp32",
    "pairs": "*i32",
}
WORDS = dict.fromkeys(("h0", "h1", "h2", "h3", "l0", "l1", "l2", "l3"), "i32")
NUMBERS = dict.fromkeys(("M", "N", "row_words", "row_blocks", "x_stride", "groups", "per_slice"), "i32")
ALIGNED = ("N", "row_words", "row_blocks", "x_stride", "groups", "per_slice")
FUSED = {
    "SPLIT": 1,
    "EVEN": True,
    "NESTED": False,
    "BIAS": False,
    "CHAIN": 1,
    "BLOCK_GROUPS": 1,
}


def fused(kernel: Any, target: str, warps: int, dtype: str = "bf16", **constants: Any) -> Any:
    types = {**POINTERS, "x_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", **NUMBERS}
    if "h0" in kernel.arg_names:
        types |= WORDS
    values = {**FUSED, **constants}
    values = {name: value for name, value in values.items() if name in kernel.arg_names}
    return build(kernel, types, values, target=target, warps=warps, gluon=True, aligned=ALIGNED)


SMALL = {"BN": 16, "BM": 8, "J": 2, "U": 4, "KW": 4, "NW": 1, "ALIGNED": True, "AHEAD": 1}
STAGED = {"BN": 64, "BM": 64, "J": 2, "U": 1, "KW": 1, "NW": 2, "ALIGNED": True, "TABLE": False, "STAGES": 3}
WARPGROUP = {"BN": 64, "BM": 64, "U": 2, "NW": 4, "TABLE": False, "STAGES": 2}


@counted
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_120"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_small_batch_kernel_decodes_a_weight_in_few_instructions(target: str, dtype: str) -> None:
    built = fused(gemm_small_batch._gemm_4bit_small_batch_kernel, target, 4, dtype, **SMALL)
    weights = 16 * 64 * 4 / 32
    # At the memory's speed an H100 can issue 5.6 instructions a weight, an A100 6.1; half of that leaves room to wait.
    assert built.instructions / weights <= 2.9
    # Two codes come from one load of the table, and 64 columns of 16 rows from two loads of 8 bytes a lane.
    assert built.loop["LDS"] == weights / 2
    assert built.loop["HMMA"] == 16
    assert built.registers_spilled <= 16


@pytest.mark.parametrize(
    "changes",
    [
        {"NESTED": True},
        {"BIAS": True, "AHEAD": 2},
        {"EVEN": False, "AHEAD": 0},
        {"J": 1, "EVEN": False},
        {"J": 1, "ALIGNED": False, "BLOCK_GROUPS": 2},
        {"CHAIN": 2, "BLOCK_GROUPS": 2},
        {"CHAIN": 4, "BLOCK_GROUPS": 64},
        {"BM": 16, "BN": 32, "NW": 2, "KW": 2},
    ],
    ids=str,
)
def test_the_small_batch_kernel_compiles_for_every_kind_of_weight(changes: dict[str, Any]) -> None:
    constants = {**SMALL, **changes}
    built = fused(
        gemm_small_batch._gemm_4bit_small_batch_kernel, "sm_90", constants["KW"] * constants["NW"], **constants
    )
    # With the static table of 32 KiB, a block must stay below the 48 KiB that need no permission.
    assert built.shared <= 16 << 10


@pytest.mark.parametrize("ahead", [3, 4])
@pytest.mark.parametrize("nested", [False, True])
def test_two_iterations_in_turn_pass_no_loaded_register_on(ahead: int, nested: bool) -> None:
    changes = {"AHEAD": ahead, "U": 2, "KW": 8, "NESTED": nested}
    built = fused(gemm_small_batch._gemm_4bit_small_batch_kernel, "sm_90", 8, **{**SMALL, **changes})
    assert built.loop["HMMA"] == 2 * 8
    assert built.registers_spilled == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_120"])
def test_the_staged_kernel_keeps_its_budget(target: str) -> None:
    built = fused(gemm_staged._gemm_4bit_staged_kernel, target, 2, **STAGED)
    # 64 rows of x cost one MMA and one FMA a weight and lane; 132 SMs at 1.75 GHz then take 60 us for 28672x8192.
    assert built.instructions / (64 * 64 / 64) <= 8.0
    assert built.loop["LDGSTS"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"NESTED": True, "BM": 16, "BIAS": True},
        {"TABLE": True, "BM": 8, "U": 2},
        {"EVEN": False, "J": 1, "U": 2},
        {"SPLIT": 4, "BM": 32},
    ],
    ids=str,
)
def test_the_staged_kernel_compiles_for_every_kind_of_weight(changes: dict[str, Any]) -> None:
    assert fused(gemm_staged._gemm_4bit_staged_kernel, "sm_90", 2, **{**STAGED, **changes}).instructions


@counted
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_the_warpgroup_kernel_feeds_the_tensor_cores_from_registers(table: bool, nested: bool) -> None:
    constants = {**WARPGROUP, "TABLE": table, "NESTED": nested}
    built = fused(gemm_warpgroup._gemm_4bit_warpgroup_kernel, "sm_90", 4, **constants)
    assert built.loop["HGMMA"] == 8
    # Two loads a group for the words, half a load a weight with the table: no decoded weight comes back.
    assert built.loop["LDS"] <= (64 if table else 0) / 2 + 16
    assert built.registers_spilled == 0


def test_the_warpgroup_kernel_compiles_with_an_uneven_k_and_long_blocks() -> None:
    constants = {**WARPGROUP, "U": 4, "CHAIN": 2, "BLOCK_GROUPS": 2, "EVEN": False, "SPLIT": 2}
    assert fused(gemm_warpgroup._gemm_4bit_warpgroup_kernel, "sm_90", 4, **constants).loop["HGMMA"] >= 16


def decoded(
    tile: Tile, dtype: str = "bf16", aligned: tuple[str, ...] = ("N", "K", "row_blocks", "steps"), **changes: Any
) -> Any:
    from triton.experimental.gluon import language as gl

    constants = {
        "BM": tile.batch, "BLOCK": 64, "ACROSS": False, "SPLIT": tile.split > 1, "NESTED": False, "BIAS": False,
        "WHOLE": not changes.get("ACROSS") and changes.get("BLOCK", 64) == 64, "EIGHTS": True, "NW": tile.n_warps,
        "REGISTERS": registers(tile), "STAGES": tile.stages, "G": tile.unroll, "PG": tile.producers, **changes,
    }  # fmt: skip
    box = [64 * tile.unroll, 16] if constants["ACROSS"] else [128, 8 * tile.unroll]
    lines = gl.NVMMASharedLayout(swizzle_byte_width=4 * box[1], element_bitwidth=32, rank=2)
    rows = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    numbers = ("M", "N", "K", "row_blocks", "steps", "per_slice")
    types = {name: kind for name, kind in POINTERS.items() if name not in ("pairs", "w_ptr")}
    types |= {
        "w_desc": f"tensordesc<i32{box},{lines!r}>", "x_desc": f"tensordesc<{dtype}[{tile.batch}, 64],{rows!r}>",
        "bias_ptr": f"*{dtype}", "out_ptr": "*fp32" if constants["SPLIT"] else f"*{dtype}",
        **{f"l{i}": "fp32" for i in range(16)}, **dict.fromkeys(numbers, "i32"),
    }  # fmt: skip
    return build(
        gemm_decoded._gemm_4bit_decoded_kernel, types, constants, target="sm_90", warps=tile.n_warps, gluon=True,
        aligned=aligned, enable_fp_fusion=False,
    )  # fmt: skip


LARGE = Tile("decoded", 256, 128, 4, 1, 8, 1, 4)
MIDDLE = Tile("decoded", 128, 128, 2, 1, 8, 1, 6, producers=2)
SMALLER = Tile("decoded", 64, 128, 2, 1, 4, 1, 6, producers=2)
PERMUTATIONS = 8 * 16 + 8
"""Of a step: 16 for each of eight words, eight for the table."""


@counted
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("across", [False, True])
def test_the_decoded_kernels_producer_keeps_ahead_of_the_tensor_cores(across: bool, dtype: str) -> None:
    built = decoded(LARGE, dtype, ACROSS=across)
    assert built.registers_spilled == 0
    ptx = built.asm["ptx"]
    assert ptx.count("wgmma.mma_async") == 4
    # The words of four steps at the start, of the next four, and four times the activation.
    assert ptx.count("cp.async.bulk.tensor") == 2 + 1 + 4
    # A step of 128 rows, 64 terms and a batch of 256 takes the tensor cores 1024 cycles; a decoding warp has a quarter
    # of the multiprocessor's integer units, 16 lanes, and 64 weights a lane: 21 permutations and shifts for 8 of them.
    assert ptx.count("prmt.b32") <= 4 * (8 * 16 + 8 + 8)
    assert ptx.count("st.shared.v4") == 4 * 8
    # Neither words nor scales of the steps to come wait in registers that a loop passes on one by one.
    assert ptx.count("ld.shared.v4") >= 8


@pytest.mark.parametrize("tile", [LARGE, MIDDLE, SMALLER], ids=lambda tile: str(tile.batch))
def test_a_producer_hands_on_each_step_as_soon_as_it_is_decoded(tile: Tile) -> None:
    ptx = decoded(tile).asm["ptx"]
    decoded_steps = [part.count("prmt.b32") // PERMUTATIONS for part in ptx.split("mbarrier.try_wait")]
    assert max(decoded_steps) == 1
    assert sum(decoded_steps) == 4


def test_nested_scales_are_multiplied_a_group_before_they_are_used() -> None:
    ptx = decoded(SMALLER, NESTED=True).asm["ptx"]
    loaded = set(re.findall(r"ld\.global\.b32 \{ (%r\d+) \}", ptx))
    products = re.findall(r"mul(?:\.rn)?\.f32\s+%r\d+, (%r\d+), (%r\d+);", ptx)
    # Of what was loaded, not of what the loop passed on: two producers' two steps, before the loop and in it.
    assert sum(loaded.issuperset(pair) for pair in products) == 2 * 2 * 2


def test_the_scales_of_a_group_of_steps_come_in_one_load() -> None:
    ptx = decoded(LARGE).asm["ptx"]
    assert ptx.count("ld.global.v4") == 3
    assert "ld.global.b32" not in ptx


@pytest.mark.parametrize("eights", [False, True])
def test_results_are_written_16_bytes_at_a_time_where_rows_are_a_multiple_of_eight(eights: bool) -> None:
    ptx = decoded(LARGE, aligned=("K", "row_blocks", "steps"), EIGHTS=eights).asm["ptx"]
    assert ("st.global.v4" in ptx) == eights


@pytest.mark.parametrize(
    ("tile", "changes"),
    [
        (Tile("decoded", 16, 128, 2, 1, 4, 1, 6, producers=2), {"NESTED": True}),
        (SMALLER, {"BIAS": True}),
        (SMALLER, {"BLOCK": 256, "NESTED": True}),
        (MIDDLE, {"SPLIT": True, "ACROSS": True, "NESTED": True}),
        (LARGE, {"SPLIT": True, "NESTED": True}),
        (LARGE, {"NESTED": True}),
        (MIDDLE, {"ACROSS": True, "NESTED": True}),
    ],
    ids=str,
)
def test_the_decoded_kernel_compiles_for_every_kind_of_weight(tile: Tile, changes: dict[str, Any]) -> None:
    assert decoded(tile, **changes).registers_spilled <= 16


NESTED_POINTERS = {name: POINTERS[name] for name in ("absmax", "absmax_8bit", "absmax_code", "absmax_offset")}
PLAIN = {
    "dequantize_4bit": (
        dequantize._dequantize_4bit_kernel,
        {"packed": "*u8", **NESTED_POINTERS, "pairs": "*i64", "out": "*bf16", "cols": "i64", "first_col": "i64",
         "slice_cols": "i64", "row_tiles": "i32", "end": "i64"},
        {"BLOCKSIZE": 64, "LANES": 128, "TILES": 4, "NESTED": True},
        ("cols", "first_col", "slice_cols", "end"),
    ),
    "dequantize_blockwise": (
        dequantize._dequantize_blockwise_kernel,
        {"codes": "*u8", "absmax": "*fp32", "code": "*fp32", "out": "*bf16", "blocksize": "i32", "numel": "i64"},
        {"LANES": 128, "WIDTH": 8, "TILES": 4},
        ("blocksize", "numel"),
    ),
    "quantize_4bit": (
        quantize_kernels._quantize_4bit_kernel,
        {"values": "*bf16", "packed": "*u8", "absmax": "*fp32", "cells": "*i64", "numel": "i64"},
        {"BLOCKSIZE": 64, "ROWS": 32, "PER_UNIT": 16.0, "SIGN": False, "ZERO_CODE": 7, "MASKED": True},
        ("numel",),
    ),
    "cells_8bit": (
        quantize_kernels._cells_8bit_kernel,
        {"code": "*fp32", "signed": "*fp32", "unsigned": "*fp32", "cells": "*i64", "widest": "*i32", "cuts": "*fp32",
         "kind": "*i32"},
        {"BLOCK": 64},
        (),
    ),
    "quantize_blockwise": (
        quantize_kernels._quantize_blockwise_kernel,
        {"values": "*fp32", "codes": "*u8", "absmax": "*fp32", "code": "*fp32", "cells": "*i64", "widest": "*i32",
         "cuts": "*fp32", "kind": "*i32", "blocksize": "i32", "numel": "i64"},
        {"WIDTH": 256, "ROWS": 8, "PROGRAMS": 64, "MASKED": False, "PTX": False},
        ("blocksize", "numel"),
    ),
    "gemm_portable": (
        gemm_portable._gemm_4bit_portable_kernel,
        {"packed": "*u8", "x": "*fp16", **NESTED_POINTERS, "levels": "*fp32", "bias": "*fp16", "out": "*fp16",
         "M": "i32", "N": "i32", "K": "i32", "x_stride": "i32"},
        {"BM": 16, "BN": 64, "BK": 64, "BLOCKSIZE": 64, "NESTED": True, "BIAS": True, "PRECISE": False},
        ("N", "K", "x_stride"),
    ),
    "sum_partial": (
        gemm_portable._sum_partial_kernel,
        {"partial": "*fp32", "bias": "*bf16", "out": "*bf16", "numel": "i32", "N": "i32"},
        {"SPLIT": 4, "BLOCK": 1024, "BIAS": True},
        ("numel", "N"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_kernel_compiles(name: str, target: str) -> None:
    kernel, types, constants, aligned = PLAIN[name]
    built = build(kernel, types, constants, target=target, aligned=aligned)
    assert built.asm["hsaco" if target == "gfx942" else "ptx"]


def test_dequantizing_writes_16_bytes_at_a_time() -> None:
    kernel, types, constants, aligned = PLAIN["dequantize_4bit"]
    built = build(kernel, types, constants, target="sm_90", aligned=aligned)
    assert built.asm["ptx"].count("st.global.v4.b32") == constants["TILES"]
