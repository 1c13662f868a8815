"""Trains a small model under ``fully_shard``; started once a process by test_sharded.py.

    python -m tests.optim.sharded_worker RANK WORLD FOLDER CLASSES FIRST LAST [FROM]

For each of the classes (between commas) takes the steps from FIRST to below LAST, after loading the sharded checkpoint
that FROM processes wrote before step FIRST, where given. Rank 0 writes ``found-<class>-<world>-<last>.pt`` with whole
parameters, the states' dtypes and the full optimizer state dict; all ranks write a sharded checkpoint halfway.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from halfbyte import optim


class Net(torch.nn.Module):
    """Rows of 70, 60 and 33 values: no process's rows begin where a block of 256 does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(101, 70)
        self.up = torch.nn.Linear(70, 83)
        self.down = torch.nn.Linear(83, 70)
        self.norm = torch.nn.LayerNorm(70)
        self.flat = torch.nn.Parameter(torch.randn(5001) * 0.1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))
        return (
            x.square().mean() + (self.flat * torch.linspace(-1, 1, 5001)).sum().square() + self.flat[:70].dot(x[0, 0])
        )


def whole(net: torch.nn.Module) -> list[torch.Tensor]:
    return [
        p.full_tensor().detach().clone() if hasattr(p, "full_tensor") else p.detach().clone() for p in net.parameters()
    ]


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for seed in steps:
        generator = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        net(torch.randint(0, 101, (4, 6), generator=generator)).backward()
        optimizer.step()


def prepared(world: int, name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    net = Net()
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for module in (net.up, net.down, net):
            fully_shard(module, mesh=mesh)
    return net, getattr(optim, name)(net.parameters(), lr=1e-2, weight_decay=0.1)


def save(net: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)


def load(net: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    model_state, optimizer_state = get_state_dict(net, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def main(rank: int, world: int, folder: Path, name: str, first: int, last: int, written_by: str) -> None:
    net, optimizer = prepared(world, name)
    if written_by:
        load(net, optimizer, folder / f"{name}-{written_by}-{first}")
    middle = (first + last) // 2
    train(net, optimizer, range(first, middle))
    save(net, optimizer, folder / f"{name}-{world}-{middle}")
    train(net, optimizer, range(middle, last))
    bits = {n: optimizer.state[p]["state1"].dtype for n, p in net.named_parameters()}
    full = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
    found = {"params": whole(net), "bits": bits, "state": full["state"]}
    if rank == 0:
        torch.save(found, folder / f"found-{name}-{world}-{last}.pt")


if __name__ == "__main__":
    this, count, where, names, start, stop = sys.argv[1:7]
    torch.set_num_threads(1)
    meeting = f"file://{where}/rendezvous-{count}-{start}"
    dist.init_process_group("gloo", init_method=meeting, rank=int(this), world_size=int(count))
    for one in names.split(","):
        main(int(this), int(count), Path(where), one, int(start), int(stop), "".join(sys.argv[7:]))
    dist.barrier()
    dist.destroy_process_group()
