"""QLoRA on two CPU processes (fully_shard, FSDP, DDP, accelerate's plugin) trains as on one; so do its checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from halfbyte.nn import Linear4bit
from halfbyte.optim import AdamW
from tests.integrations.conftest import saved, tiny_llama
from tests.integrations.fsdp_worker import KINDS, STEPS, adapter, batch, qlora, step, trainable
from tests.support.sharding import needs_bytes_sharded

ROOT = Path(__file__).parents[2]
WORLD = 2
# Sums of gradients over rows in another order, which Adam divides by their size; in bf16 they have 8 bits.
TOLERANCE = {"fully_shard in bfloat16": 0.1}

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and what two processes found."""
    folder = tmp_path_factory.mktemp("fsdp")
    torch.manual_seed(9)
    saved(tiny_llama(), folder / "model")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # the processes meet at a file
        "ACCELERATE_USE_CPU": "true",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.fsdp_worker", str(rank), str(WORLD), str(folder)],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[list[float], dict[str, Any]]:
    """Losses and adapter of one process that sees whole batches."""
    model = qlora(folder / "model", "uint8")
    optimizer = AdamW(trainable(model), lr=1e-2)
    return [step(model, optimizer, batch(index)) for index in range(STEPS)], adapter(model)


def apart(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Distance of two adapters over the length of one."""
    assert found.keys() == expected.keys()
    ours, theirs = (torch.cat([one[name].flatten() for name in expected]) for one in (found, expected))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(kind: str, folder: Path, alone: Any) -> None:
    found = torch.load(folder / f"found-{kind}.pt")
    losses, expected = alone
    assert losses[-1] < losses[0]
    assert found["losses"] == pytest.approx(losses, rel=0.02 if "bfloat16" in kind else 1e-5)
    assert apart(found["adapter"], expected) < TOLERANCE.get(kind, 1e-4)


@needs_bytes_sharded
def test_fully_shard_splits_the_packed_bytes(folder: Path) -> None:
    model = qlora(folder / "model", "uint8")
    codes = sum(module.weight.numel() for module in model.modules() if isinstance(module, Linear4bit))
    assert torch.load(folder / "found-fully_shard.pt")["sharded"] > codes


def resumed(folder: Path, kind: str) -> dict[str, Any]:
    """The adapter of one process that goes on from the checkpoint of two."""
    model = qlora(folder / "model", "uint8", seed=7)
    optimizer = AdamW(trainable(model), lr=1e-2)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.weight.data.zero_()
            module.weight.quant_state.absmax.zero_()
    if kind == "full":
        model_state, optimizer_state = torch.load(folder / "full.pt")
    else:
        step(model, optimizer, batch(100))  # states to be read into
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=folder / "sharded")
        model_state, optimizer_state = state["model"], state["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    for index in range(STEPS // 2, STEPS):
        step(model, optimizer, batch(index))
    return adapter(model)


@needs_bytes_sharded
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_checkpoint_of_two_processes_resumes_on_one(kind: str, folder: Path) -> None:
    found = torch.load(folder / "found-fully_shard.pt")["adapter"]
    assert apart(resumed(folder, kind), found) < 1e-4


@needs_bytes_sharded
def test_the_full_checkpoint_is_the_whole_quantized_model(folder: Path) -> None:
    state, _ = torch.load(folder / "full.pt")
    expected = qlora(folder / "model", "uint8").state_dict()
    assert state.keys() == expected.keys()
    frozen = [key for key in state if "lora_" not in key]
    assert any(key.endswith("weight.nested_absmax") for key in frozen)
    assert all(torch.equal(state[key], expected[key]) for key in frozen)
