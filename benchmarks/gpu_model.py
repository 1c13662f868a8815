"""A Llama-3-8B-shaped model with random weights on a GPU: bf16, halfbyte NF4, bitsandbytes NF4.

Run: ``python benchmarks/gpu_model.py [--out FOLDER] [--layers 32] [--only halfbyte,bitsandbytes,bf16]``. Nothing is
downloaded. All models stand side by side; per way: seconds to make and quantize all weights, layer by layer; memory;
tokens per second at batch 1, 8 and 32, 64 tokens of context, of one decoding step replayed as a CUDA graph ("graph"),
of the same step with its layers through ``torch.compile`` ("compiled"), and of ``generate`` ("generate", eager);
milliseconds for a prompt of 2048 tokens. Every figure is printed when it is there. Kernel times of a step and of the
prompt, by class, go to ``gpu_model_profile.csv``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
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
from benchmarks.gpu_profile import kernel_times

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
    *(f"compiled_{batch}" for batch in BATCHES),
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


@contextlib.contextmanager
def compiled_layers(model: Any, cache: Any) -> Iterator[Any]:
    """The model's layers as calls of one compiled function, each with its own part of the cache under number 0.

    All layers share one compilation that way: numbers of layers are constants to torch, a compilation for each.
    """
    torch.compiler.reset()  # its limit of versions counts all models and batches together
    layers = list(model.model.layers)
    compiled = torch.compile(type(layers[0]).forward, dynamic=False, fullgraph=True)
    for number, layer in enumerate(layers):
        own = copy.copy(cache)
        own.layers = [cache.layers[number]]
        for tensor in vars(own.layers[0]).values():
            if hasattr(tensor, "_dynamo_static_input_type"):  # a version for each address
                del tensor._dynamo_static_input_type
        layer.self_attn.layer_idx = 0

        def run(*args: Any, _layer: Any = layer, _own: Any = own, past_key_values: Any = None, **named: Any) -> Any:
            del past_key_values
            return compiled(_layer, *args, past_key_values=_own, **named)

        layer.forward = run
    try:
        yield compiled
    finally:
        for number, layer in enumerate(layers):
            layer.self_attn.layer_idx = number
            del layer.forward


class Step:
    """One decoding step as a CUDA graph, each replay one token further."""

    def __init__(self, model: Any, batch: int, *, compiled: bool) -> None:
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
        with compiled_layers(model, cache) if compiled else contextlib.nullcontext() as kept:
            with torch.cuda.stream(stream):
                step()
                step()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self.logits = step()
        graph.replay()
        self._kept = graph, cache, token, place, kept

    def replay(self) -> None:
        """One more token."""
        self._kept[0].replay()

    def microseconds(self) -> float:
        """Median time of a replay."""
        taken = sorted(seconds(self.replay) for _ in range(30))
        return taken[len(taken) // 2] * 1e6


def generated(model: Any, batch: int, new_tokens: int) -> float:
    """Tokens per second of ``generate``, eager: the prompt's own time is taken off."""
    tokens = torch.randint(0, 1000, (batch, CONTEXT), device="cuda")

    def run(count: int) -> None:
        model.generate(tokens, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)

    run(2)
    short = min(seconds(lambda: run(2)) for _ in range(2))
    long = min(seconds(lambda: run(new_tokens)) for _ in range(2))
    return batch * (new_tokens - 2) / (long - short)


def prompt_us(call: Callable[[], Any]) -> float:
    """Microseconds for a prompt, after a first one."""
    call()
    return min(seconds(call) for _ in range(3)) * 1e6


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

    def __init__(self, name: str, config: Any, *, nested: bool, keep: Callable[[str, dict[str, Any]], None]) -> None:
        self.name = name
        self.row: dict[str, Any] = {**dict.fromkeys(COLUMNS, ""), "way": name, "nested": nested and name != "bf16"}
        self._keep = keep
        self._profiled: list[tuple[str, float, Callable[[], Any]]] = []
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
        self._keep("gpu_model.csv", self.row)

    def profile(self) -> None:
        """Print and keep kernel times. After all that is timed: a profiler, once used, slows launches down."""
        for job, wall, call in self._profiled:
            with torch.no_grad():
                times, words = kernel_times(call)
            busy = sum(value for key, value in times.items() if key.endswith("_us"))
            rest = {"wall_us": round(wall, 1), "between_us": round(wall - busy, 1)}
            row = {"way": self.name, "job": job, **rest, **times}
            say(" ".join(f"{key}={value}" for key, value in row.items()))
            for line in words:
                say("   ", line)
            self._keep("gpu_model_profile.csv", row)

    def step(self, name: str, batch: int, *, compiled: bool, profile: bool) -> float:
        """Tokens per second of a step."""
        step = Step(self.model, batch, compiled=compiled)
        taken = step.microseconds()
        if profile:
            self._profiled.append((name, taken, step.replay))
        return batch * 1e6 / taken

    def prompt(self, name: str, *, profile: bool) -> float:
        """Milliseconds for 2048 tokens."""
        tokens = torch.randint(0, 1000, (1, 2048), device="cuda")

        def call() -> Any:
            return self.model(tokens, logits_to_keep=1)

        taken = prompt_us(call)
        if profile:
            self._profiled.append((name, taken, call))
        return taken / 1e3

    def measure(self, name: str, job: Callable[[Way], float]) -> None:
        """One figure, and the peak of memory on the way there."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - self.memory
        try:
            with torch.no_grad():
                found = job(self)
            if name.startswith("generate"):  # host time: the quietest of some rounds
                say(self.name, name, "in this round", round(found, 1))
                found = max(found, float(self.row[name] or 0))
            self.note(name, found)
        except RuntimeError as error:  # something in the model cannot be captured: say what, go on with the rest
            torch.cuda.synchronize()
            self.note(name, f"failed: {str(error).splitlines()[0][:60]}")
        if name.startswith(("generate", "prompt")):
            peak = (torch.cuda.max_memory_allocated() - others) / 1e9
            self.note("peak_gb", max(peak, float(self.row["peak_gb"] or 0)))


def jobs(compiled: list[int], new_tokens: int) -> list[tuple[str, Callable[[Way], float]]]:
    """All figures in the order in which they are taken."""
    one = BATCHES[0]
    found: list[tuple[str, Callable[[Way], float]]] = [
        (f"graph_{b}", lambda way, b=b: way.step(f"graph_{b}", b, compiled=False, profile=b == one)) for b in BATCHES
    ]
    found += [("prompt_2048_ms", lambda way: way.prompt("prompt_2048", profile=True))]
    eager = [(f"generate_{b}", lambda way, b=b: generated(way.model, b, new_tokens)) for b in BATCHES]
    fused = [
        (f"compiled_{b}", lambda way, b=b: way.step(f"compiled_{b}", b, compiled=True, profile=b == one))
        for b in compiled
    ]
    # Host time: ways take turns, round by round, and the quietest round counts.
    return [*found, *eager[:1], *fused[:1], *eager[:1] * 2, *eager[1:], *fused[1:], *eager[1:]]


def main() -> None:
    """Measure all ways, write ``gpu_model.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=14)
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--compiled", type=int, nargs="*", default=list(BATCHES), help="batches to compile for, too")
    parser.add_argument("--plain", action="store_true", help="scales not quantized again (transformers' default)")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further figure after this long")
    parser.add_argument("--lock", type=Path, help="held while measuring: benchmarks with the same file take turns")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tables: dict[str, dict[tuple[Any, Any], dict[str, Any]]] = {}
    device = {"device": torch.cuda.get_device_name(), "layers": arguments.layers}

    def keep(name: str, row: dict[str, Any]) -> None:
        table = tables.setdefault(name, {})
        table[row["way"], row.get("job")] = {**row, **device}
        write_csv(name, table.values(), arguments.out)

    ways: list[Way] = []
    for name in arguments.only.split(","):
        if name != "bf16" and importlib.util.find_spec(name) is None:
            say(f"{name} is not installed, left out")
            continue
        with turn(arguments.lock):
            ways.append(Way(name, shape(arguments.layers), nested=not arguments.plain, keep=keep))
    for name, job in jobs(arguments.compiled, arguments.new_tokens):
        for way in ways:
            if time.perf_counter() - BEGIN > arguments.seconds:
                say(way.name, "left out for want of time:", name)
                continue
            with turn(arguments.lock):
                way.measure(name, job)
    for way in ways:
        with turn(arguments.lock):
            way.profile()


if __name__ == "__main__":
    main()
