"""Fine-tunes SmolLM2-135M on real text with 8-bit and with 32-bit states, same data, and plots the losses.

    python benchmarks/optim_training.py [--names ...] [--forms ...]   train and plot
    python benchmarks/optim_training.py --plot                        only plot what is there
    python benchmarks/optim_training.py --all-8 TEXT [--names ...]    another address

"8" keeps every state in 8 bits; with "8, embeddings 32", as transformers' Trainer does, embeddings keep 32-bit ones.
Writes ``benchmarks/results/optim-training.csv`` (optimizer, bits, step, loss), in which it replaces what it trains
again, and ``docs/images/optim-training.png``. ``--all-8`` adds rows to ``benchmarks/results/optim-training-all-8.csv``
(optimizer, states, text, mean of the last ten losses, mean loss of the 16 batches that follow) for 32-bit and 8-bit
states and, where it is installed, for bitsandbytes' 8-bit ones. A CPU takes some seconds for a step.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from halfbyte import optim
from halfbyte.demo import assets

HERE = Path(__file__).parent
RESULT = HERE / "results" / "optim-training.csv"
PLOT = HERE.parent / "docs" / "images" / "optim-training.png"
ALL_8 = HERE / "results" / "optim-training-all-8.csv"
STEPS, LENGTH, LAST, BEHIND = 50, 32, 10, 16
RATES = {"AdamW": 1e-4, "Lion": 2e-5, "AdEMAMix": 1e-4}
"""Optimizer -> learning rate."""

FORMS = ("32", "8", "8, embeddings 32")
STYLES = ({"lw": 3, "alpha": 0.35}, {"lw": 1.2}, {"lw": 1.2, "ls": "--"})


def batches(tokenizer: Any, text: str = "1905-Roosevelt-1") -> list[torch.Tensor]:
    """One row of tokens for each step and for each batch behind them, from one speech in order."""
    ids = tokenizer(assets.speech(text), return_tensors="pt").input_ids[0]
    return [ids[i * LENGTH : (i + 1) * LENGTH][None] for i in range(STEPS + BEHIND)]


def train(name: str, form: str, folder: Path) -> list[float]:
    """Loss of every step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    manager = optim.GlobalOptimManager.get_instance()
    manager.initialize()
    if "embeddings" in form:
        manager.register_module_override(model.get_input_embeddings(), "weight", {"optim_bits": 32})
    kind = getattr(optim, f"{name}{form.split(',')[0]}bit")
    optimizer = kind(model.parameters(), lr=RATES[name], weight_decay=0.01)
    return descend(model, optimizer, batches(AutoTokenizer.from_pretrained(folder))[:STEPS], f"{name} {form}")


def descend(model: Any, optimizer: Any, every: list[torch.Tensor], what: str) -> list[float]:
    """Loss of every batch, a step after each."""
    losses: list[float] = []
    for ids in every:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"{what}, step {len(losses)}: {losses[-1]:.4f}", flush=True)
    return losses


def all_8(text: str, names: list[str], forms: list[str]) -> None:
    """Every state in 8 bits against every state in 32, with what comes after."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.model_dir(print, use_hub=False)
    every = batches(AutoTokenizer.from_pretrained(folder), text)
    kinds = [(form, optim, int(form)) for form in ("32", "8") if form in forms]
    if importlib.util.find_spec("bitsandbytes"):
        kinds.append(("8, bitsandbytes", importlib.import_module("bitsandbytes.optim"), 8))
    for name in names:
        for label, source, bits in kinds:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            optimizer = getattr(source, f"{name}{bits}bit")(model.parameters(), lr=RATES[name], weight_decay=0.01)
            losses = descend(model, optimizer, every[:STEPS], f"{name} {label}")
            with torch.no_grad():
                behind = [model(input_ids=ids, labels=ids).loss.item() for ids in every[STEPS:]]
            means = sum(losses[-LAST:]) / LAST, sum(behind) / BEHIND
            fresh = not ALL_8.exists()
            with ALL_8.open("a", newline="") as file:
                writer = csv.writer(file)
                if fresh:
                    writer.writerow(["optimizer", "states", "text", "last_ten", "next_16"])
                writer.writerow([name, label, text, *(f"{mean:.5f}" for mean in means)])


def run(names: list[str], forms: list[str]) -> None:
    """Trainings, in place of those that are in the file."""
    folder = assets.model_dir(print, use_hub=False)
    found = curves() if RESULT.exists() else {}
    for name in names:
        for form in forms:
            found[name, form] = train(name, form, folder)
            with RESULT.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["optimizer", "bits", "step", "loss"])
                for (who, bits), losses in found.items():
                    writer.writerows([who, bits, step, f"{loss:.5f}"] for step, loss in enumerate(losses, 1))


def curves() -> dict[tuple[str, str], list[float]]:
    """(optimizer, form) -> losses."""
    found: dict[tuple[str, str], list[float]] = {}
    with RESULT.open() as file:
        for row in csv.DictReader(file):
            found.setdefault((row["optimizer"], row["bits"]), []).append(float(row["loss"]))
    return found


def report() -> bool:
    """Print the mean of the last losses; whether 8 bits are within 1 % of 32 everywhere."""
    found, good = curves(), True
    for name in RATES:
        high = sum(found[name, "32"][-LAST:]) / LAST
        for form in FORMS[1:]:
            if (name, form) in found:
                low = sum(found[name, form][-LAST:]) / LAST
                good &= abs(low / high - 1) <= 0.01
                print(f"{name}, {form} bits: last {LAST} losses {low:.4f}, with 32 {high:.4f} ({low / high - 1:+.3%})")
    return good


def plot() -> None:
    """One panel for each optimizer."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(RATES), figsize=(11, 3.2), sharey=True)
    for panel, name in zip(panels, RATES, strict=True):
        for form, style in zip(FORMS, STYLES, strict=True):
            losses = curves().get((name, form), [])
            panel.plot(range(1, len(losses) + 1), losses, label=f"{form} bits", **style)
        panel.set_title(name)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss")
    panels[0].legend()
    figure.tight_layout()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)


def main() -> int:
    """Train unless told not to; plot; fail if 8 bits cost more than 1 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="train nothing")
    parser.add_argument("--all-8", metavar="TEXT", help="an address, such as 1946-Truman-1")
    parser.add_argument("--names", nargs="+", default=list(RATES), choices=RATES)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    given = parser.parse_args()
    if given.all_8:
        all_8(given.all_8, given.names, given.forms)
        return 0
    if not given.plot:
        run(given.names, given.forms)
    good = report()
    plot()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
