"""Tuning data: every file fits the schema, every tile a kernel; unknown GPUs and shapes get a usable closed form."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest

pytest.importorskip("triton")

from halfbyte.backends.triton import tuning
from halfbyte.backends.triton.device import Gpu
from halfbyte.errors import ArgumentError

FOLDER = resources.files("halfbyte.backends.triton") / "tuning"
FILES = sorted(
    file.name
    for file in FOLDER.iterdir()
    if file.name.endswith(".json") and not file.name.startswith(("int8", "experts"))
)
HOPPER = Gpu("sm_90", 132, 50 << 20, gluon=True)
ADA = Gpu("sm_89", 128, 72 << 20, gluon=True)
TILE_KEYS = {"kind", "batch", "rows", "unroll", "k_warps", "n_warps", "split", "stages", "table"}


@pytest.mark.parametrize("name", FILES)
def test_a_tuning_file_has_the_schemas_keys_and_its_own_architecture(name: str) -> None:
    document: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert set(document) == {"arch", "device", "measured", "tiles", "fused", "fused_backward"}
    assert f"{document['arch']}.json" == name
    for entry in document["tiles"]:
        assert set(entry) == {"batch", "n", "k", "tile"}
        assert set(entry["tile"]) - {"producers"} == TILE_KEYS
        assert entry["batch"] in tuning.FUSED_BATCHES
        assert entry["tile"]["batch"] >= min(entry["batch"], 8) or entry["tile"]["kind"] != "register"
    for entry in document["fused"] + document["fused_backward"]:
        assert set(entry) == {"n", "k", "up_to"}


@pytest.mark.parametrize("name", FILES)
def test_the_tiles_of_a_file_fit_the_multiprocessors_shared_memory(name: str) -> None:
    table = tuning.read(name.removesuffix(".json"))
    assert table is not None
    for entry in table.entries:
        decoding = (32 << 10) * (entry.tile.table and entry.tile.kind != "decoded")
        assert entry.tile.shared_bytes() + decoding <= 227 << 10, entry


@pytest.mark.parametrize("gpu", [HOPPER, ADA], ids=lambda gpu: gpu.arch)
@pytest.mark.parametrize("batch", tuning.FUSED_BATCHES)
@pytest.mark.parametrize("shape", [(64, 64), (4096, 4096), (1024, 14336), (131072, 4096)], ids=str)
def test_the_closed_form_covers_every_shape_within_the_shared_memory(
    gpu: Gpu, batch: int, shape: tuple[int, int]
) -> None:
    tile = tuning.closed_form(gpu, batch, *shape)
    assert tile.batch >= min(batch, 8)
    assert tile.shared_bytes() + (32 << 10) * tile.table <= (226 if tile.kind == "decoded" else 99) << 10
    assert (tile.kind in ("warpgroup", "decoded")) <= (gpu is HOPPER)


@pytest.mark.parametrize(
    ("batch", "width", "terms", "split"),
    [
        (64, 14336, 4096, 1),  # 112 programs on 132 multiprocessors
        (128, 4096, 14336, 4),  # 32
        (256, 8192, 28672, 2),  # 64
        (512, 4096, 4096, 2),  # two tiles of the batch: 64
        (128, 5000, 3072, 3),  # 40
        (128, 256, 1024, 2),  # 8 steps a slice at least
    ],
)
def test_a_decoded_product_is_split_until_the_multiprocessors_are_full(
    batch: int, width: int, terms: int, split: int
) -> None:
    assert tuning.decoded_form(HOPPER, batch, width, terms).split == split


def test_a_measured_shape_lends_its_tile_to_its_neighbours_only() -> None:
    table = tuning.read("sm_90")
    assert table is not None
    measured = {(e.batch, e.n, e.k): e.tile for e in table.entries}
    assert tuning.tile_for(HOPPER, 1, 4096, 4096) == measured[1, 4096, 4096]
    assert tuning.tile_for(HOPPER, 1, 6144, 4096) == measured[1, 4096, 4096]
    assert tuning.tile_for(HOPPER, 1, 64, 4096) == tuning.closed_form(HOPPER, 1, 64, 4096)
    assert tuning.tile_for(ADA, 1, 4096, 4096) == tuning.closed_form(ADA, 1, 4096, 4096)


def test_the_backward_is_decoded_up_to_what_was_measured_and_sliced_beyond() -> None:
    assert tuning.backward_tile_for(HOPPER, 1, 4096, 4096) == tuning.decoded_form(HOPPER, 1, 4096, 4096)
    assert tuning.backward_tile_for(HOPPER, 512, 28672, 8192) == tuning.decoded_form(HOPPER, 512, 8192, 28672)
    assert tuning.backward_tile_for(HOPPER, 1 << 20, 4096, 4096) is None
    assert tuning.backward_tile_for(ADA, 1, 4096, 4096) is None


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 24},
        {"k_warps": 32},
        {"kind": "other"},
        {"unroll": 8},
        {"kind": "warpgroup", "n_warps": 2, "rows": 32},
        {"kind": "decoded", "n_warps": 2, "rows": 32},
        {"kind": "decoded", "k_warps": 1, "n_warps": 8, "rows": 128, "producers": 2},
        {"kind": "decoded", "k_warps": 1, "n_warps": 8, "rows": 128, "unroll": 2, "producers": 2, "stages": 2},
        {"kind": "decoded", "k_warps": 1, "n_warps": 8, "rows": 128, "stages": 0},
        {"kind": "decoded", "k_warps": 1, "n_warps": 8, "rows": 128, "stages": 3},
    ],
    ids=str,
)
def test_a_tile_that_no_kernel_has_is_refused(change: dict[str, Any]) -> None:
    good = {
        "kind": "register", "batch": 8, "rows": 16, "unroll": 4, "k_warps": 4, "n_warps": 1, "split": 1, "stages": 1
    }  # fmt: skip
    tuning.Tile(**good)
    with pytest.raises(ArgumentError):
        tuning.Tile(**{**good, **change})
