"""Fine-tunes SmolLM2-135M on real text with 8-bit and with 32-bit states, same data, and plots the losses.

    python benchmarks/optim_training.py                train and plot
    python benchmarks/optim_training.py --plot         only plot what is there

Embeddings keep 32-bit states, as with transformers' Trainer.
Writes ``benchmarks/results/optim-training.csv`` (optimizer, bits, step, loss) and ``docs/images/optim-training.png``.
A CPU takes some seconds for a step.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import torch

from halfbyte import optim
from halfbyte.demo import assets

HERE = Path(__file__).parent
RESULT = HERE / "results" / "optim-training.csv"
PLOT = HERE.parent / "docs" / "images" / "optim-training.png"
STEPS, LENGTH, LAST = 50, 32, 10
RATES = {"AdamW": 1e-4, "Lion": 2e-5, "AdEMAMix": 1e-4}
"""Optimizer -> learning rate."""


def batches(tokenizer: Any) -> list[torch.Tensor]:
    """One row of tokens for each step, from one speech in order."""
    ids = tokenizer(assets.speech("1905-Roosevelt-1"), return_tensors="pt").input_ids[0]
    return [ids[i * LENGTH : (i + 1) * LENGTH][None] for i in range(STEPS)]


def train(name: str, bits: int, folder: Path) -> list[float]:
    """Loss of every step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # As transformers' Trainer does: rows of rare tokens need more than 8 bits.
    manager = optim.GlobalOptimManager.get_instance()
    manager.register_module_override(model.get_input_embeddings(), "weight", {"optim_bits": 32})
    optimizer = getattr(optim, f"{name}{bits}bit")(model.parameters(), lr=RATES[name], weight_decay=0.01)
    losses: list[float] = []
    for ids in batches(AutoTokenizer.from_pretrained(folder)):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"{name} {bits} bits, step {len(losses)}: {losses[-1]:.4f}", flush=True)
    return losses


def run() -> None:
    """All six trainings."""
    folder = assets.model_dir(print, use_hub=False)
    rows: list[dict[str, Any]] = []
    for name in RATES:
        for bits in (32, 8):
            losses = train(name, bits, folder)
            rows += [{"optimizer": name, "bits": bits, "step": i, "loss": f"{v:.5f}"} for i, v in enumerate(losses, 1)]
            RESULT.parent.mkdir(exist_ok=True)
            with RESULT.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["optimizer", "bits", "step", "loss"])
                writer.writeheader()
                writer.writerows(rows)


def curves() -> dict[tuple[str, int], list[float]]:
    """(optimizer, bits) -> losses."""
    found: dict[tuple[str, int], list[float]] = {}
    with RESULT.open() as file:
        for row in csv.DictReader(file):
            found.setdefault((row["optimizer"], int(row["bits"])), []).append(float(row["loss"]))
    return found


def report() -> bool:
    """Print the mean of the last losses; whether 8 bits are within 1 % of 32 everywhere."""
    found, good = curves(), True
    for name in RATES:
        if (name, 8) not in found:
            continue
        low, high = (sum(found[name, bits][-LAST:]) / LAST for bits in (8, 32))
        good &= abs(low / high - 1) <= 0.01
        print(
            f"{name}: mean of the last {LAST} losses {high:.4f} with 32 bits, {low:.4f} with 8 ({low / high - 1:+.3%})"
        )
    return good


def plot() -> None:
    """One panel for each optimizer."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(RATES), figsize=(11, 3.2), sharey=True)
    for panel, name in zip(panels, RATES, strict=True):
        for bits, style in ((32, {"lw": 3, "alpha": 0.35}), (8, {"lw": 1.2})):
            losses = curves().get((name, bits), [])
            panel.plot(range(1, len(losses) + 1), losses, label=f"{bits}-bit states", **style)
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
    if not parser.parse_args().plot:
        run()
    good = report()
    plot()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
