"""A QLoRA training step of a Llama-3-8B-shaped model on a GPU: halfbyte against bitsandbytes.

Run: ``python benchmarks/gpu_qlora.py [--out FOLDER] [--layers 32] [--only halfbyte,bitsandbytes]``. NF4 with nested
scales, bf16, LoRA of rank 16 on every linear layer of the blocks through peft, gradient checkpointing, each package's
8-bit AdamW. Random weights and tokens; nothing is downloaded. Each way has a process of its own, where peft finds
halfbyte under the name of bitsandbytes, as users have it; they start together and take turns on the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_csv
from benchmarks.gpu_model import build, say, seconds, shape, turn

SIZES = ((1, 2048), (4, 1024), (1, 1024))
"""Sequences and their lengths."""

WAYS = ("halfbyte", "bitsandbytes")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(way: str, config: Any, device: str) -> tuple[Any, torch.optim.Optimizer]:
    """The model with adapters and its optimizer, which only sees them."""
    if way == "halfbyte":
        import halfbyte

        halfbyte.install_as_bitsandbytes(replace=True)
        from halfbyte.optim import AdamW8bit
    else:
        from bitsandbytes.optim import AdamW8bit
    from peft import LoraConfig, get_peft_model

    config.use_cache = False
    base = build(way, config, device=device)
    base.is_loaded_in_4bit = True
    base.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    return model, AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def step_of(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    """One training step; returns the loss."""
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def measure(way: str, layers: int, limit: float, lock: Path) -> None:
    """Print one JSON line for each size."""
    torch.manual_seed(0)
    begin = time.perf_counter()
    import peft
    import transformers

    say(way, "peft", peft.__version__, "transformers", transformers.__version__, "imported")
    with turn(lock):
        model, optimizer = trained(way, shape(layers), "cuda")
        gc.collect()
        torch.cuda.empty_cache()
    memory = torch.cuda.memory_allocated() / 1e9
    say(way, f"model with adapters after {time.perf_counter() - begin:.1f} s: {memory:.3f} GB")
    kind = type(next(m for n, m in model.named_modules() if n.endswith("q_proj"))).__module__
    for batch, length in SIZES:
        if time.perf_counter() - begin > limit:
            say(way, "left out for want of time:", batch, length)
            continue
        with turn(lock):
            row = timed(way, model, optimizer, batch, length)
        row |= {"memory_gb": round(memory, 3), "adapter": kind, "layers": layers}
        print("ROW " + json.dumps(row), flush=True)


def timed(way: str, model: Any, optimizer: torch.optim.Optimizer, batch: int, length: int) -> dict[str, Any]:
    """Times and peak memory of steps of one size."""
    tokens = torch.randint(0, 128000, (batch, length), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    first = seconds(lambda: step_of(model, optimizer, tokens))
    losses: list[float] = []
    taken = sorted(seconds(lambda: losses.append(step_of(model, optimizer, tokens))) for _ in range(7))
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.empty_cache()
    return {
        "way": way,
        "batch": batch,
        "tokens": length,
        "step_ms": round(taken[3] * 1e3, 1),
        "least_ms": round(taken[0] * 1e3, 1),
        "first_step_ms": round(first * 1e3, 1),
        "peak_gb": round(peak, 3),
        "loss": round(losses[-1], 4),
        "device": torch.cuda.get_device_name(),
    }


def profile(way: str, layers: int) -> None:
    """Print where the GPU's time goes in one step of 1x2048 tokens."""
    torch.manual_seed(0)
    model, optimizer = trained(way, shape(layers), "cuda")
    tokens = torch.randint(0, 128000, (1, 2048), device="cuda")
    step_of(model, optimizer, tokens)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as found:
        step_of(model, optimizer, tokens)
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))


def main() -> None:
    """Run every way in a process of its own, write ``gpu_qlora.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--seconds", type=float, default=1e9, help="a way starts no further size after this long")
    parser.add_argument("--profile", action="store_true", help="a table of kernels instead of times")
    parser.add_argument("--lock", type=Path, help="held while measuring: benchmarks with the same file take turns")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        if arguments.profile:
            profile(arguments.child, arguments.layers)
        else:
            measure(arguments.child, arguments.layers, arguments.seconds, arguments.lock)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        children: list[subprocess.Popen[str]] = []
        for way in arguments.only.split(","):
            if importlib.util.find_spec(way) is None:
                say(f"{way} is not installed, left out")
                continue
            command = [sys.executable, "-W", "ignore", __file__, "--child", way, "--layers", str(arguments.layers)]
            command += ["--seconds", str(arguments.seconds)] + ["--profile"] * arguments.profile
            command += ["--lock", str(arguments.lock or Path(folder) / "lock")]
            children.append(running.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
        with selectors.DefaultSelector() as ready:
            for child in children:
                ready.register(child.stdout, selectors.EVENT_READ)
            while ready.get_map():
                for key, _ in ready.select():
                    line = key.fileobj.readline()
                    if not line:
                        ready.unregister(key.fileobj)
                        continue
                    print(line, end="", flush=True)
                    if line.startswith("ROW "):
                        rows.append(json.loads(line[4:]))
                        write_csv("gpu_qlora.csv", rows, arguments.out)


if __name__ == "__main__":
    main()
