"""Tuning: what is tried fits the GPU, and what the user measured goes before our own file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from halfbyte.backends.triton import tune, tuning
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
    assert (found.device, found.fused) == ("Mine", ((64, 64, 8),))
    # The command measures no backward.
    assert found.backward
    assert (found.backward, found.fused_backward) == (ours.backward, ours.fused_backward)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"device": "x", "tiles": [{}], "fused": []}'])
def test_a_damaged_file_is_named(own: Path, text: str) -> None:
    (own / "sm_90.json").write_text(text)
    with pytest.raises(ArgumentError, match=r"sm_90.json is no tuning file.*(\n.*)*halfbyte bench tune"):
        tuning.read("sm_90")
