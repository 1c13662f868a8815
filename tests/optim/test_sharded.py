"""FSDP2 on several CPU processes: the same bits as one process, and checkpoints that go from either to the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
WRAPPER = "__bnb_optimizer_quant_state__"
STEPS = 20
CLASSES = ["AdamW8bit", "AdEMAMix8bit", "Lion8bit"]
Found = dict[str, dict[str, Any]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"),
]


def run(folder: Path, names: list[str], world: int, first: int, last: int, written_by: int | None = None) -> Found:
    """What rank 0 found after these steps on ``world`` processes, by class."""
    words = [str(folder), ",".join(names), str(first), str(last), *([str(written_by)] if written_by else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.optim.sharded_worker", str(rank), str(world), *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return {name: torch.load(folder / f"found-{name}-{world}-{last}.pt") for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def one(folder: Path) -> Found:
    """20 steps on one process, with a checkpoint after 10."""
    return run(folder, CLASSES, 1, 0, STEPS)


@pytest.fixture(scope="module")
def two(folder: Path) -> Found:
    """20 steps on two processes, with a checkpoint after 10."""
    return run(folder, CLASSES, 2, 0, STEPS)


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    for a, b in zip(left["params"], right["params"], strict=True):
        assert torch.equal(a, b)
    assert left["bits"] == right["bits"]
    assert left["state"].keys() == right["state"].keys()
    for name, entries in left["state"].items():
        other = right["state"][name]
        assert entries["step"] == other["step"]
        for key, value in entries[WRAPPER].items():
            assert torch.equal(value, other[WRAPPER][key]), (name, key)


@pytest.mark.parametrize("name", CLASSES)
def test_two_processes_give_the_bits_of_one(name: str, one: Found, two: Found) -> None:
    assert one[name]["bits"]["flat"] == torch.uint8
    assert one[name]["bits"]["up.bias"] == torch.float32
    assert_same(one[name], two[name])


def test_four_processes_give_the_bits_of_one(folder: Path, one: Found) -> None:
    assert_same(one["AdamW8bit"], run(folder, ["AdamW8bit"], 4, 0, STEPS)["AdamW8bit"])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_checkpoint_of_some_processes_resumes_on_others(
    before: int, after: int, folder: Path, one: Found, two: Found
) -> None:
    assert_same(one["AdamW8bit"], run(folder, ["AdamW8bit"], after, 10, STEPS, before)["AdamW8bit"])
