"""A Llama-3-8B-shaped model with random weights on a GPU: bf16, halfbyte NF4, bitsandbytes NF4.

Run: ``python benchmarks/gpu_model.py [--out FOLDER] [--layers 32] [--only halfbyte,bitsandbytes,bf16]``. Nothing is
downloaded. Per way: seconds to make and quantize all weights, layer by layer; memory; milliseconds for a prompt of 2048
tokens; tokens per second at batch 1, 8 and 32 of one decoding step replayed as a CUDA graph, and of transformers'
``generate``. Every figure is printed when it is there.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_csv

BATCHES = (1, 8, 32)
WAYS = ("halfbyte", "bitsandbytes", "bf16")
COLUMNS = (
    "way",
    "nested",
    "load_s",
    "load_peak_gb",
    "memory_gb",
    "peak_gb",
    *(f"graph_{batch}" for batch in BATCHES),
    *(f"generate_{batch}" for batch in BATCHES),
    "prompt_2048_ms",
)
BEGIN = time.perf_counter()


def say(*parts: object) -> None:
    """Print at once, with the seconds since the start."""
    print(f"[{time.perf_counter() - BEGIN:5.1f} s]", *parts, flush=True)


def shape(layers: int) -> Any:
    """The configuration of Llama-3-8B with that many layers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )


def build(way: str, config: Any, *, nested: bool = True, device: str = "cuda") -> Any:
    """The model with random weights: each is made on the device, quantized unless ``way`` is bf16, before the next."""
    from transformers import LlamaForCausalLM

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    linear_4bit = None if way == "bf16" else importlib.import_module(f"{way}.nn").Linear4bit
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if linear_4bit is not None and type(child) is torch.nn.Linear and name != "lm_head":
                setattr(parent, name, _quantized(linear_4bit, child, nested, device))
        for name, weight in list(parent.named_parameters(recurse=False)):
            if weight.device.type == "meta":
                setattr(parent, name, torch.nn.Parameter(_random(weight.shape, device), requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return model.eval()


def _random(size: Any, device: str) -> torch.Tensor:
    if len(size) == 1:  # the gain of a norm
        return torch.ones(size, dtype=torch.bfloat16, device=device)
    return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, 0.02)


def _quantized(linear_4bit: Any, plain: torch.nn.Linear, nested: bool, device: str) -> torch.nn.Module:
    with torch.device("meta"):
        layer = linear_4bit(plain.in_features, plain.out_features, False, torch.bfloat16, nested, quant_type="nf4")
    weight = _random(plain.weight.shape, device)
    layer.weight = type(layer.weight)(weight, requires_grad=False, compress_statistics=nested, quant_type="nf4")
    return layer.to(device)


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of ``call`` with the device idle before and after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def graphed(model: Any, batch: int) -> float:
    """Tokens per second of one decoding step replayed as a CUDA graph, 256 tokens of context."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=512)
    prompt = torch.randint(0, 1000, (batch, 256), device="cuda")
    model(prompt, past_key_values=cache, cache_position=torch.arange(256, device="cuda"), logits_to_keep=1)
    token = torch.randint(0, 1000, (batch, 1), device="cuda")
    place = torch.tensor([256], device="cuda")

    def step() -> Any:
        return model(token, past_key_values=cache, cache_position=place, position_ids=place[None]).logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return batch / min(seconds(graph.replay) for _ in range(20))


def generated(model: Any, batch: int, new_tokens: int) -> float:
    """Tokens per second of ``generate``, eager, after a prompt of 64 tokens: the prompt's own time is taken off."""
    tokens = torch.randint(0, 1000, (batch, 64), device="cuda")

    def run(count: int) -> None:
        model.generate(tokens, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)

    run(3)
    short = min(seconds(lambda: run(2)) for _ in range(2))
    long = min(seconds(lambda: run(new_tokens)) for _ in range(2))
    return batch * (new_tokens - 2) / (long - short)


def prompt_ms(model: Any) -> float:
    """Milliseconds for 2048 tokens."""
    prompt = torch.randint(0, 1000, (1, 2048), device="cuda")
    model(prompt, logits_to_keep=1)
    return min(seconds(lambda: model(prompt, logits_to_keep=1)) for _ in range(3)) * 1e3


def measure(
    way: str, config: Any, new_tokens: int, deadline: float, keep: Callable[[dict[str, Any]], None], *, nested: bool
) -> None:
    """All figures of one way, in the order of their weight; ``keep`` gets the row after each."""
    row: dict[str, Any] = {**dict.fromkeys(COLUMNS, ""), "way": way, "nested": nested}

    def note(name: str, value: Any) -> None:
        row[name] = round(value, 3) if isinstance(value, float) else value
        say(way, "nested" if nested else "plain", name, row[name])
        keep(row)

    torch.cuda.reset_peak_memory_stats()
    made: list[Any] = []
    note("load_s", seconds(lambda: made.append(build(way, config, nested=nested))))
    model = made.pop()
    note("load_peak_gb", torch.cuda.max_memory_allocated() / 1e9)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    note("memory_gb", torch.cuda.memory_allocated() / 1e9)
    jobs: list[tuple[str, Callable[[], float]]] = [(f"graph_{b}", lambda b=b: graphed(model, b)) for b in BATCHES]
    jobs += [(f"generate_{b}", lambda b=b: generated(model, b, new_tokens)) for b in BATCHES]
    jobs += [("prompt_2048_ms", lambda: prompt_ms(model))]
    with torch.no_grad():
        for name, job in jobs:
            if time.perf_counter() - BEGIN > deadline:
                say(way, "left out for want of time:", name)
                continue
            try:
                note(name, job())
            except RuntimeError as error:  # something in the model cannot be captured: say what, go on with the rest
                torch.cuda.synchronize()
                note(name, f"failed: {str(error).splitlines()[0][:60]}")
            if not name.startswith("graph"):
                note("peak_gb", torch.cuda.max_memory_allocated() / 1e9)
            gc.collect()
            if name == f"graph_{BATCHES[-1]}":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Measure all ways, write ``gpu_model.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=26)
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--plain", action="store_true", help="scales not quantized again (transformers' default)")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further figure after this long")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: dict[str, dict[str, Any]] = {}
    device = {"device": torch.cuda.get_device_name(), "layers": arguments.layers}

    def keep(row: dict[str, Any]) -> None:
        rows[row["way"]] = {**row, **device}
        write_csv("gpu_model.csv", rows.values(), arguments.out)

    ways = arguments.only.split(",")
    for place, way in enumerate(ways):
        if way != "bf16" and importlib.util.find_spec(way) is None:
            say(f"{way} is not installed, left out")
            continue
        deadline = arguments.seconds * (place + 1) / len(ways)
        measure(way, shape(arguments.layers), arguments.new_tokens, deadline, keep, nested=not arguments.plain)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
