"""Files are written whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from halfbyte.checkpoint import write
from halfbyte.errors import CheckpointError


def test_tensors_read_back_with_the_header_that_transformers_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    given = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.uint8), "empty": torch.zeros(0)}
    write(given, path, {"by": "a test"})
    found = load_file(path)
    assert all(torch.equal(found[name], given[name]) for name in given)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "by": "a test"}


def test_nothing_else_is_left_in_the_folder(tmp_path: Path) -> None:
    write({"a": torch.zeros(3)}, tmp_path / "x.safetensors")
    write({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [1, 1, 1]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_new_file_has_the_users_mode_and_an_old_one_keeps_its_own(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = tmp_path / "x.safetensors"
    write({"a": torch.zeros(3)}, path)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    path.chmod(0o640)
    write({"a": torch.zeros(3)}, path)
    assert path.stat().st_mode & 0o777 == 0o640


def test_tensors_that_share_memory_or_lie_strided_are_written_each(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    given = {"a": base, "b": base, "row": base[1], "turned": base.t()}
    write(given, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], given[name]) for name in given)


def test_a_tensor_without_values_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write({"a": torch.zeros(3)}, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="b is on the meta device; expected tensors with values"):
        write({"a": torch.ones(3), "b": torch.empty(3, device="meta")}, path)
    assert path.read_bytes() == before


def test_a_folder_that_there_is_not_is_a_readable_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors could not be written .*\nhint: "):
        write({"a": torch.zeros(3)}, tmp_path / "nowhere" / "x.safetensors")


FULL_DISK = """
import resource, signal, sys, torch
from halfbyte.checkpoint import write
from halfbyte.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write({"a": torch.ones(1_000_000)}, sys.argv[1])
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits as Linux has them")
def test_a_disk_that_takes_no_more_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write({"a": torch.zeros(3)}, path)
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["x.safetensors"]
