"""A Llama-3-8B-shaped model with random weights on a GPU: bf16, halfbyte NF4, bitsandbytes NF4.

Run: ``python benchmarks/gpu_model.py [--out FOLDER] [--layers 32] [--only halfbyte,bitsandbytes,bf16]``. Nothing is
downloaded. All models stand side by side; per way: seconds to make and quantize all weights, layer by layer; memory;
tokens per second at batch 1, 8 and 32, 64 tokens of context, of one decoding step replayed as a CUDA graph ("graph"),
of the same with transformers' norms and rotary embedding compiled ("fused"), and of ``generate`` ("generate", eager);
milliseconds for a prompt of 2048 tokens. Every figure is printed when it is there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
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
    *(f"fused_{batch}" for batch in BATCHES),
    *(f"generate_{batch}" for batch in BATCHES),
    "prompt_2048_ms",
)
CONTEXT, ROOM = 64, 128
"""Tokens before those that are timed, and places in the cache."""

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
    replaced: set[torch.nn.Module] = set()
    for parent in list(model.modules()):
        if parent in replaced:
            continue
        for name, child in list(parent.named_children()):
            if linear_4bit is not None and type(child) is torch.nn.Linear and name != "lm_head":
                replaced.add(child)
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


def graphed(model: Any, batch: int, around: Callable[[], Any] = contextlib.nullcontext) -> float:
    """Tokens per second of one decoding step, made within ``around()``, replayed as a CUDA graph."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    prompt = torch.randint(0, 1000, (batch, CONTEXT), device="cuda")
    model(prompt, past_key_values=cache, cache_position=torch.arange(CONTEXT, device="cuda"), logits_to_keep=1)
    token = torch.randint(0, 1000, (batch, 1), device="cuda")
    place = torch.tensor([CONTEXT], device="cuda")

    def step() -> Any:
        return model(token, past_key_values=cache, cache_position=place, position_ids=place[None]).logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with around():
        with torch.cuda.stream(stream):
            step()
            step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            step()
    graph.replay()
    taken = sorted(seconds(graph.replay) for _ in range(30))
    return batch / taken[len(taken) // 2]


@functools.lru_cache(maxsize=2)
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled for each shape it meets."""
    return torch.compile(function, dynamic=False)


@contextlib.contextmanager
def fused() -> Iterator[None]:
    """transformers' norms and rotary embedding as one compiled kernel each, for every way alike."""
    from transformers.models.llama import modeling_llama

    norm, rotary = modeling_llama.LlamaRMSNorm.forward, modeling_llama.apply_rotary_pos_emb
    modeling_llama.LlamaRMSNorm.forward = compiled(norm)
    modeling_llama.apply_rotary_pos_emb = compiled(rotary)
    try:
        yield
    finally:
        modeling_llama.LlamaRMSNorm.forward, modeling_llama.apply_rotary_pos_emb = norm, rotary


def fused_graph(model: Any, batch: int) -> float:
    """:func:`graphed` with :func:`fused`."""
    return graphed(model, batch, fused)


def generated(model: Any, batch: int, new_tokens: int) -> float:
    """Tokens per second of ``generate``, eager: the prompt's own time is taken off."""
    tokens = torch.randint(0, 1000, (batch, CONTEXT), device="cuda")

    def run(count: int) -> None:
        model.generate(tokens, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)

    run(2)
    short = min(seconds(lambda: run(2)) for _ in range(2))
    long = min(seconds(lambda: run(new_tokens)) for _ in range(2))
    return batch * (new_tokens - 2) / (long - short)


def prompt_ms(model: Any) -> float:
    """Milliseconds for 2048 tokens."""
    prompt = torch.randint(0, 1000, (1, 2048), device="cuda")
    model(prompt, logits_to_keep=1)
    return min(seconds(lambda: model(prompt, logits_to_keep=1)) for _ in range(3)) * 1e3


@contextlib.contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """The GPU to ourselves, among processes that were given the same lock file."""
    if lock is None:
        yield
        return
    import fcntl

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Way:
    """One model with the row of its figures."""

    def __init__(self, name: str, config: Any, *, nested: bool, keep: Callable[[dict[str, Any]], None]) -> None:
        self.name = name
        self.row: dict[str, Any] = {**dict.fromkeys(COLUMNS, ""), "way": name, "nested": nested and name != "bf16"}
        self._keep = keep
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made: list[Any] = []
        self.note("load_s", seconds(lambda: made.append(build(name, config, nested=nested))))
        self.model = made.pop()
        self.note("load_peak_gb", (torch.cuda.max_memory_allocated() - before) / 1e9)
        gc.collect()
        self.memory = torch.cuda.memory_allocated() - before
        self.note("memory_gb", self.memory / 1e9)

    def note(self, name: str, value: Any) -> None:
        """Print and keep one figure."""
        self.row[name] = round(value, 3) if isinstance(value, float) else value
        say(self.name, name, self.row[name])
        self._keep(self.row)

    def measure(self, name: str, job: Callable[[Any], float]) -> None:
        """One figure, and the peak of memory on the way there."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - self.memory
        try:
            with torch.no_grad():
                found = job(self.model)
            if name.startswith("generate") and self.row[name]:  # host time: the quieter of two rounds
                found = max(found, float(self.row[name]))
            self.note(name, found)
        except RuntimeError as error:  # something in the model cannot be captured: say what, go on with the rest
            torch.cuda.synchronize()
            self.note(name, f"failed: {str(error).splitlines()[0][:60]}")
        if name.startswith(("generate", "prompt")):
            peak = (torch.cuda.max_memory_allocated() - others) / 1e9
            self.note("peak_gb", max(peak, float(self.row["peak_gb"] or 0)))


def main() -> None:
    """Measure all ways, write ``gpu_model.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=14)
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--plain", action="store_true", help="scales not quantized again (transformers' default)")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further figure after this long")
    parser.add_argument("--lock", type=Path, help="held while measuring: benchmarks with the same file take turns")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: dict[str, dict[str, Any]] = {}
    device = {"device": torch.cuda.get_device_name(), "layers": arguments.layers}

    def keep(row: dict[str, Any]) -> None:
        rows[row["way"]] = {**row, **device}
        write_csv("gpu_model.csv", rows.values(), arguments.out)

    ways: list[Way] = []
    for name in arguments.only.split(","):
        if name != "bf16" and importlib.util.find_spec(name) is None:
            say(f"{name} is not installed, left out")
            continue
        with turn(arguments.lock):
            ways.append(Way(name, shape(arguments.layers), nested=not arguments.plain, keep=keep))
    jobs: list[tuple[str, Callable[[Any], float]]] = []
    jobs += [(f"graph_{b}", lambda model, b=b: graphed(model, b)) for b in BATCHES]
    eager = [(f"generate_{b}", lambda model, b=b: generated(model, b, arguments.new_tokens)) for b in BATCHES]
    jobs += [("prompt_2048_ms", prompt_ms), *eager]
    jobs += [(f"fused_{b}", lambda model, b=b: fused_graph(model, b)) for b in BATCHES]
    jobs += eager
    for name, job in jobs:
        for way in ways:
            if time.perf_counter() - BEGIN > arguments.seconds:
                say(way.name, "left out for want of time:", name)
                continue
            with turn(arguments.lock):
                way.measure(name, job)


if __name__ == "__main__":
    main()
