"""Draws docs/images/cpu_matmul.png from benchmarks/results/cpu_matmul.csv and cpu_codes.csv.

Usage: python benchmarks/cpu_plot.py [--results FOLDER] [--out FILE]
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
COLORS = {
    "halfbyte": "#1b6ca8",
    "halfbyte nested": "#7fb2d9",
    "torch dense": "#888888",
    "bitsandbytes repacked": "#e8a33d",
    "bitsandbytes canonical": "#c0392b",
    "bitsandbytes": "#c0392b",
}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def bars(axis: plt.Axes, groups: list[str], found: dict[str, dict[str, float]], title: str) -> None:
    """One bar for each contestant in each group; milliseconds on a logarithmic axis."""
    names = [name for name in COLORS if any(name in found[group] for group in groups)]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [(j + i * width, found[group][name]) for j, group in enumerate(groups) if name in found[group]]
        bar = axis.bar([x for x, _ in places], [y for _, y in places], width, label=name, color=COLORS[name])
        axis.bar_label(bar, fmt="%.3g", fontsize=6)
    axis.set_xticks([j + 0.4 - width / 2 for j in range(len(groups))], groups, fontsize=8)
    axis.set_yscale("log")
    axis.set_ylabel("ms (least of the run)")
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "cpu_matmul.png")
    args = parser.parse_args()
    products, codes = rows(args.results / "cpu_matmul.csv"), rows(args.results / "cpu_codes.csv")
    figure, axes = plt.subplots(2, 1, figsize=(9, 8), constrained_layout=True)
    found: dict[str, dict[str, float]] = {}
    for row in products:
        if row["dtype"] == "bf16" and row["shape"] == "4096x4096":
            found.setdefault(f"batch {row['batch']}", {})[row["who"]] = float(row["min_ms"])
    facts = products[0]
    where = f"{facts['machine']}, {facts['threads']} threads, torch {facts['torch']}"
    bars(axes[0], list(found), found, f"NF4 product, 4096 x 4096, bf16 activations ({where})")
    jobs: dict[str, dict[str, float]] = {}
    for row in codes:
        if row["dtype"] == "fp32":
            jobs.setdefault(row["job"], {})[row["who"]] = float(row["min_ms"])
    bars(axes[1], list(jobs), jobs, "Codes of 16.8 million fp32 values, fresh results")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()
