"""Tuning: what is tried fits the GPU, and what the user measured goes before our own file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from halfbyte.backends.triton import tune, tuning
from halfbyte.backends.triton.device import Gpu
from halfbyte.errors import ArgumentError

SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_120": 99 << 10}


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("batch", tuning.FUSED_BATCHES)
def test_every_bucket_has_tiles_that_fit(arch: str, batch: int) -> None:
    tiles = list(tune.candidates(batch, arch, SHARED[arch]))
    assert tiles
    for tile in tiles:
        assert tile.shared_bytes() <= SHARED[arch]
        assert arch == "sm_90" or tile.kind in {"register", "staged"}
    assert len(set(tiles)) == len(tiles)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder of the user's own tuning files."""
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path))
    tuning.read.cache_clear()
    (tmp_path / "tuning").mkdir()
    yield tmp_path / "tuning"
    tuning.read.cache_clear()


def test_the_users_own_file_goes_before_ours(own: Path) -> None:
    ours = tuning.read("sm_90")
    assert ours is not None
    tuning.read.cache_clear()
    document = {"arch": "sm_90", "device": "Mine", "tiles": [], "fused": [{"n": 64, "k": 64, "up_to": 8}]}
    (own / "sm_90.json").write_text(json.dumps(document))
    found = tuning.read("sm_90")
    assert found is not None
    assert (found.device, found.fused) == ("Mine", ((64, 64, 8), *ours.fused))
    # The command measures no backward.
    assert found.fused_backward == ours.fused_backward


def test_a_tile_of_the_users_own_is_taken_and_ours_for_other_rows(own: Path) -> None:
    gpu = Gpu("sm_90", 132, 50 << 20, gluon=True)
    tuning.tile_for.cache_clear()
    shipped = {batch: tuning.tile_for(gpu, batch, 4096, 4096) for batch in (1, 8)}
    mine = replace(shipped[1], rows=64, n_warps=2)
    tuning.read.cache_clear()
    tuning.tile_for.cache_clear()
    tiles = [{"batch": 1, "n": 4096, "k": 4096, "tile": asdict(mine)}]
    (own / "sm_90.json").write_text(json.dumps({"arch": "sm_90", "device": "Mine", "tiles": tiles, "fused": []}))
    assert tuning.tile_for(gpu, 1, 4096, 4096) == mine
    assert tuning.tile_for(gpu, 8, 4096, 4096) == shipped[8]
    assert tuning.fused_up_to(gpu, 4096, 4096) > 8
    tuning.tile_for.cache_clear()


def test_rows_without_tiles_of_their_own_cannot_be_tuned() -> None:
    with pytest.raises(ArgumentError, match="there are no tiles for 3 rows; expected one of 1, 8, 16"):
        tune.tune([(64, 64)], [3], 1, print, print)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"device": "x", "tiles": [{}], "fused": []}'])
def test_a_damaged_file_is_named(own: Path, text: str) -> None:
    (own / "sm_90.json").write_text(text)
    with pytest.raises(ArgumentError, match=r"sm_90.json is no tuning file.*(\n.*)*halfbyte bench tune"):
        tuning.read("sm_90")
