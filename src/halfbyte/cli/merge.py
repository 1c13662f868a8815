"""``halfbyte merge``: an adapter into a checkpoint in 4 bits, 8 bits or bf16, and what survived the rounding."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.errors import UnsupportedError

if TYPE_CHECKING:
    from halfbyte.integrations.merging import Survival

__all__ = ["main"]

SHOWN = 12
"""Layers in the table without ``--verbose``: those that lost most."""


def main(argv: Sequence[str]) -> int:
    """Merge; 0 if every layer kept its change, 1 if rounding undid most of it somewhere."""
    options = _parser().parse_args(argv)
    missing = [name for name in ("transformers", "peft", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"merging needs {', '.join(missing)}", hint=f"pip install {' '.join(missing)}")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from halfbyte.integrations.merging import merge

    columns = (TextColumn("merging"), BarColumn(), MofNCompleteColumn(), TextColumn("tensors"), TimeRemainingColumn())
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=None)
        survival = merge(
            options.base,
            options.adapter,
            options.out,
            to=options.to,
            quant_type=options.quant_type,
            double_quant=False if options.single_quant else None,
            shard_bytes=int(options.shard_gb * 1e9),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if options.json:
        print(survival.json())
    else:
        _show(survival, options.out, options.verbose)
    return 1 if survival.lost else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="halfbyte merge",
        description="Merge an adapter into a checkpoint, a weight at a time, and report what survives the rounding.",
        epilog="exit codes: 0 merged, 1 merged but rounding undid most of the change in some layers, 2 not merged",
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="folder of the base model: dense, 4-bit or 8-bit")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of the adapter")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--to", choices=("4bit", "8bit", "bf16"), help="what to store (default: as the base is)")
    parser.add_argument("--quant-type", choices=("nf4", "fp4"), help="of 4-bit weights (default: the base's, or nf4)")
    parser.add_argument("--single-quant", action="store_true", help="keep 4-bit scales in fp32")
    parser.add_argument("--shard-gb", type=float, default=2.0, metavar="GB", help="greatest file size (default 2)")
    parser.add_argument("-v", "--verbose", action="store_true", help="show every layer")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _show(survival: Survival, out: Path, verbose: bool) -> None:
    layers = sorted(survival.layers, key=lambda layer: layer.kept)
    shown = layers if verbose else layers[:SHOWN]
    width = max([len(layer.name) for layer in shown], default=0)
    print(f"{'':<{width}}  change   kept  cosine")
    for layer in shown:
        mark = "  lost" if layer.lost else ""
        print(f"{layer.name:<{width}}  {layer.change:6.2%}  {layer.kept:5.0%}  {layer.cosine:6.2f}{mark}")
    if len(layers) > len(shown):
        print(f"... and {len(layers) - len(shown)} weights that kept more (all of them: --verbose)")
    if survival.replaced:
        print(f"taken whole from the adapter: {', '.join(survival.replaced)}")
    first, _, rest = survival.summary().partition("\n")
    print(f"{first}; {survival.nbytes / 1e6:.1f} MB in {out}")
    if rest:
        print(rest, file=sys.stderr)
