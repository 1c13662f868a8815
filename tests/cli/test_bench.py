"""``halfbyte bench``: figures of this machine; ``bench tune`` refuses where there is nothing to tune."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.backends import gpu_support, registry
from halfbyte.cli import main as cli


def test_it_prints_one_line_for_each_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "cpu", "--shape", "64x128"]) == 0
    printed = capsys.readouterr().out
    assert "NF4 layers on cpu against dense" in printed
    assert printed.count("64x128") == 3


def test_the_figures_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "cpu", "--shape", "64x128", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["rows"] for row in rows] == [1, 8, 128]
    for row in rows:
        assert row["speedup"] == pytest.approx(row["dense_us"] / row["nf4_us"], abs=0.02)


@pytest.mark.parametrize("shape", ["64", "64x", "0x64", "ax64", "-1x64"])
def test_a_shape_that_is_none_is_refused(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", f"--shape={shape}"]) == 2
    assert "expected OUTxIN, as 4096x4096" in capsys.readouterr().err


def test_a_device_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "nonsense"]) == 2
    assert "expected cuda, cuda:N or cpu" in capsys.readouterr().err


def test_tuning_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_support, "why_not", lambda: "torch sees no GPU")
    assert cli.main(["bench", "tune"]) == 2
    assert "nothing to tune: torch sees no GPU" in capsys.readouterr().err


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU measures at once."""

    def tune(shapes, batches, workers, expect, tick):
        expect(1)
        tick(f"{workers} workers")
        tiles = [{"batch": m, "n": n, "k": k, "tile": {}} for n, k in shapes or [(8, 8)] for m in batches or [1]]
        return {"arch": "sm_00", "device": "A GPU", "tiles": tiles, "fused": []}

    monkeypatch.setattr(gpu_support, "why_not", lambda: None)
    monkeypatch.setattr(registry, "tune", tune)


@pytest.mark.usefixtures("measured")
def test_tuning_writes_the_file_it_is_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "tiles.json"
    assert cli.main(["bench", "tune", "--out", str(out), "--shape", "64x128"]) == 0
    assert json.loads(out.read_text())["arch"] == "sm_00"
    assert str(out) in capsys.readouterr().out


@pytest.mark.usefixtures("measured")
def test_tuning_writes_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path))
    assert cli.main(["bench", "tune"]) == 0
    assert (tmp_path / "tuning" / "sm_00.json").is_file()


@pytest.mark.usefixtures("measured")
def test_a_file_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", "tune", "--out", str(tmp_path / "file" / "tiles.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_help_and_a_wrong_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    assert "tune" in capsys.readouterr().out
    assert cli.main(["bench", "--no-such-option"]) == 2


@pytest.mark.usefixtures("measured")
def test_tuning_other_rows_keeps_what_was_measured_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tiles.json"
    for rows in ("1", "8", "8"):
        assert cli.main(["bench", "tune", "--out", str(out), "--shape", "64x128", "--rows", rows]) == 0
        assert "1 tiles measured" in capsys.readouterr().out
    assert [tile["batch"] for tile in json.loads(out.read_text())["tiles"]] == [8, 1]


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("before", ["", "[]", '{"device": "Another", "tiles": [{}], "fused": []}'])
def test_tuning_replaces_a_file_that_is_damaged_or_of_another_gpu(before: str, tmp_path: Path) -> None:
    out = tmp_path / "tiles.json"
    out.write_text(before)
    assert cli.main(["bench", "tune", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["tiles"] == [{"batch": 1, "n": 8, "k": 8, "tile": {}}]


@pytest.mark.parametrize("rows", ["0", "-1", "many"])
def test_rows_that_are_no_number_are_refused(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "tune", f"--rows={rows}"]) == 2
    assert "expected a number of rows" in capsys.readouterr().err
