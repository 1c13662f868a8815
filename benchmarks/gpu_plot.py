"""Draw ``results/gpu_4bit.csv`` into ``docs/images/gpu_4bit.svg``: time over rows, one panel a shape."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
LINES = {
    "ours": ("halfbyte NF4", "#0b6e4f", "o"),
    "bnb": ("bitsandbytes 0.50.2 NF4", "#c1121f", "s"),
    "bf16": ("F.linear bf16", "#555555", "^"),
    "torch_int4": ("torch int4 (other format)", "#b08900", "x"),
}


def main() -> None:
    """Read, draw, write."""
    with (ROOT / "benchmarks" / "results" / "gpu_4bit.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in rows))[:4]
    figure, panels = plt.subplots(1, len(shapes), figsize=(4.2 * len(shapes), 3.8), squeeze=False)
    for panel, (n, k) in zip(panels[0], shapes, strict=True):
        here = [row for row in rows if (row["n"], row["k"]) == (n, k)]
        for column, (label, color, marker) in LINES.items():
            points = [(int(row["m"]), float(row[column])) for row in here if row.get(column)]
            if points:
                panel.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, markersize=3.5, lw=1.2)
        panel.axhline(float(here[0]["floor"]), color="#999999", lw=0.8, ls=":", label="bytes at 3.0 TB/s")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_title(f"{n} x {k}", fontsize=10)
        panel.set_xlabel("rows of activations")
    panels[0][0].set_ylabel("µs, CUDA graph")
    panels[0][0].legend(fontsize=7, frameon=False)
    figure.suptitle(f"4-bit products on one {rows[0]['device']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "gpu_4bit.svg")


if __name__ == "__main__":
    main()
