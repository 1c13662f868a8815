"""Every name of bitsandbytes that Hugging Face's libraries touch is there; the probe finds one that is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.python import python

PROBE = Path(__file__).with_name("probe_huggingface.py")


@pytest.mark.parametrize("way", ["run", "shim"])
def test_every_name_that_the_libraries_touch_is_there(way: str, shim_site: Path) -> None:
    words = ["-m", "halfbyte", "run", PROBE] if way == "run" else [PROBE]
    done = python(words, path=[shim_site] if way == "shim" else [])
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row for row in rows if row[0] != "ok"] == []
    assert done.returncode == 0, done.stderr
    found = {row[1] for row in rows if row[3].startswith("transformers/")}
    assert {"nn.Linear4bit", "nn.Params4bit.from_prequantized", "optim.GlobalOptimManager.get_instance"} <= found
    assert {row[3].partition("/")[0] for row in rows} >= {"listed", "transformers", "peft", "accelerate"}


def test_the_probe_notices_what_is_missing(tmp_path: Path) -> None:
    package = tmp_path / "trl"
    package.mkdir()
    (package / "__init__.py").write_text("import bitsandbytes as bnb\nbnb.nn.Linear3bit\n")
    done = python(["-m", "halfbyte", "run", PROBE], path=[tmp_path])
    assert done.returncode == 1
    assert "MISSING\tnn.Linear3bit\t" in done.stdout
    assert sys.version_info >= (3, 10)
