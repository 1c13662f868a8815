"""Trains a tiny QLoRA model on several CPU processes; started once a process by test_fsdp.py.

    python -m tests.integrations.fsdp_worker RANK WORLD FOLDER

FOLDER holds the model in ``model/``. For each of KINDS it takes STEPS steps, each process on its
rows of every batch; rank 0 writes ``found-<kind>.pt`` with the losses and the whole adapter. ``fully_shard`` also
writes a full and a sharded checkpoint after half of the steps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import halfbyte
from halfbyte.nn import Linear4bit
from halfbyte.optim import AdamW
from tests.support.sharding import SHARDS_BYTES

__all__ = ["KINDS", "STEPS", "adapter", "batch", "qlora", "step"]

STEPS = 4
FULLY_SHARDED = {
    "fully_shard": "uint8",
    "fully_shard in bfloat16": "uint8",
    "fully_shard, float32 storage": "float32",
}
KINDS = {
    **(FULLY_SHARDED if SHARDS_BYTES else {}),
    "FSDP": "uint8",
    "FSDP, float32 storage": "float32",
    "DDP": "uint8",
    "accelerate FSDP2": "uint8",
    "accelerate FSDP1": "float32",
}
"""How the model is distributed -> bnb_4bit_quant_storage."""


def qlora(folder: Path, storage: str, seed: int = 0) -> Any:
    """The model with an adapter, whose values are drawn from the seed."""
    halfbyte.install_as_bitsandbytes(replace=True)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])).train()


def batch(index: int) -> Tensor:
    """Four rows of 16 tokens, which a small model learns within a few steps."""
    return (torch.arange(16) * 7 + torch.arange(4)[:, None] + 4 * (index % 2)) % 256


def step(model: Any, optimizer: Any, rows: Tensor) -> float:
    optimizer.zero_grad()
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adapter(model: Any) -> dict[str, Tensor]:
    """The adapter's values, whole, by names that no wrapper changes."""
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            whole = p.full_tensor() if hasattr(p, "full_tensor") else p
            found[name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")] = whole.detach().clone()
    return found


def distributed(kind: str, model: Any) -> Any:
    """The model, distributed over the processes."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    if kind.startswith("fully_shard"):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if "bfloat16" in kind else MixedPrecisionPolicy()
        for block in model.base_model.model.model.layers:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        return model
    if kind == "DDP":
        return torch.nn.parallel.DistributedDataParallel(model)
    codes = [m.weight for m in model.modules() if isinstance(m, Linear4bit) and not m.weight.is_floating_point()]
    return FullyShardedDataParallel(
        model,
        use_orig_params=True,
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        ignored_states=codes,
        device_id=torch.device("cpu"),
    )


def prepared(kind: str, model: Any) -> tuple[Any, Any]:
    """Model and optimizer from accelerate's plugin, as a training script configures it."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=int(kind[-1]),
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        use_orig_params=True if kind[-1] == "1" else None,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    return accelerator.prepare(model, AdamW(trainable(model), lr=1e-2))


def save(model: Any, optimizer: Any, folder: Path) -> None:
    """A full checkpoint by rank 0, and a sharded one by all."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "sharded")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        torch.save(whole, folder / "full.pt")


def run(kind: str, rank: int, world: int, folder: Path) -> None:
    model = qlora(folder / "model", KINDS[kind])
    if kind.startswith("accelerate"):
        model, optimizer = prepared(kind, model)
    else:
        model = distributed(kind, model)
        optimizer = AdamW(trainable(model), lr=1e-2)
    losses: list[float] = []
    sharded = (
        sum(p.numel() for p in model.parameters() if p.to_local().numel() < p.numel()) if kind == "fully_shard" else 0
    )
    for index in range(STEPS):
        if kind == "fully_shard" and index == STEPS // 2:
            save(model, optimizer, folder)
        losses.append(step(model, optimizer, batch(index).chunk(world)[rank]))
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    if kind.startswith(("FSDP", "accelerate FSDP1")):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model):
            found = adapter(model)
    else:
        found = adapter(model)
    if rank == 0:
        torch.save(
            {"losses": (mean / world).tolist(), "adapter": found, "sharded": sharded}, folder / f"found-{kind}.pt"
        )


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for kind in KINDS:
        run(kind, rank, world, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
