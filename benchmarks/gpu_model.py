"""A Llama-3-8B-shaped model with random weights on a GPU: bf16, halfbyte NF4, bitsandbytes NF4.

Run: ``python benchmarks/gpu_model.py [--out FOLDER] [--layers 32] [--only bf16,halfbyte,bitsandbytes]``. Nothing is
downloaded. Per way: seconds to quantize, peak memory, prompt time (2048 tokens), tokens per second of ``generate`` at
batch 1, 8 and 32, and of one decoding step captured as a CUDA graph.
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
COLUMNS = ("way", "quantize_s", "memory_gb", "peak_gb", "prompt_2048_ms")


def build(layers: int) -> Any:
    """The unquantized model in bf16, random, on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    config.dtype = torch.bfloat16
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def quantize(model: Any, package: str) -> None:
    """Every linear layer but the head becomes ``package``'s Linear4bit, with nested scales as in QLoRA."""
    linear_4bit = importlib.import_module(f"{package}.nn").Linear4bit
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear or name == "lm_head":
                continue
            with torch.device("meta"):
                layer = linear_4bit(
                    child.in_features, child.out_features, False, torch.bfloat16, True, quant_type="nf4"
                )
            params = type(layer.weight)
            layer.weight = params(
                child.weight.data,
                requires_grad=False,
                compress_statistics=True,
                quant_type="nf4",
            )
            child.weight = None
            setattr(parent, name, layer.cuda())


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
    model(prompt, past_key_values=cache, cache_position=torch.arange(256, device="cuda"))
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
    return batch * 20 / seconds(lambda: [graph.replay() for _ in range(20)])


def measure(way: str, layers: int, new_tokens: int) -> dict[str, Any]:
    """The row of one way."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row["way"] = way
    model = build(layers)
    if way != "bf16":
        row["quantize_s"] = round(seconds(lambda: quantize(model, way)), 2)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    row["memory_gb"] = round(torch.cuda.memory_allocated() / 1e9, 3)
    with torch.no_grad():
        prompt = torch.randint(0, 1000, (1, 2048), device="cuda")
        model(prompt, logits_to_keep=1)
        row["prompt_2048_ms"] = round(min(seconds(lambda: model(prompt, logits_to_keep=1)) for _ in range(3)) * 1e3, 1)
        for batch in BATCHES:
            tokens = torch.randint(0, 1000, (batch, 64), device="cuda")
            options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
            model.generate(tokens, max_new_tokens=2, min_new_tokens=2, **options)
            long = seconds(lambda t=tokens, o=options: model.generate(t, max_new_tokens=new_tokens, **o))
            short = seconds(lambda t=tokens, o=options: model.generate(t, max_new_tokens=2, **o))
            row[f"generate_{batch}"] = round(batch * (new_tokens - 2) / (long - short), 1)
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        for batch in BATCHES:
            try:
                row[f"graph_{batch}"] = round(graphed(model, batch), 1)
            except RuntimeError as error:  # something in the model cannot be captured: say what, go on with the rest
                torch.cuda.synchronize()
                row[f"graph_{batch}"] = f"not captured: {str(error).splitlines()[0][:60]}"
    return row


def main() -> None:
    """Measure all ways, write ``gpu_model.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=26)
    parser.add_argument("--only", default="halfbyte,bf16,bitsandbytes")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for way in arguments.only.split(","):
        if way != "bf16" and importlib.util.find_spec(way) is None:
            print(f"{way} is not installed, left out")
            continue
        rows.append(measure(way, arguments.layers, arguments.new_tokens))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
        device = {"device": torch.cuda.get_device_name(), "layers": arguments.layers}
        write_csv("gpu_model.csv", ({**row, **device} for row in rows), arguments.out)


if __name__ == "__main__":
    main()
