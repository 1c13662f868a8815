"""``halfbyte warmup``: compile ahead what a model needs, so that its first forward does not wait for it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from halfbyte.errors import ArgumentError

__all__ = ["main"]

DTYPES = ("float32", "bfloat16", "float16")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="halfbyte warmup",
        description="Compile ahead what 4-bit models need on this machine and keep it on disk.",
        epilog="exit status: 0 done, 2 wrong command line",
    )
    parser.add_argument(
        "model", nargs="?", type=Path, help="folder of a model: compile for its dtype alone (default: for all three)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``halfbyte warmup``; returns 0 done, 2 wrong command line."""
    try:
        options = _parser().parse_args(list(argv))
    except SystemExit as stop:  # argparse has printed its message
        return 0 if stop.code in {0, None} else 2
    names = DTYPES if options.model is None else (_dtype_of(options.model),)

    import torch

    from halfbyte.backends import registry

    registry.warmup(print, [getattr(torch, name) for name in names])
    return 0


def _dtype_of(folder: Path) -> str:
    """What the model computes in: its 4-bit compute dtype, else its own dtype.

    Raises:
        ArgumentError: The folder has no readable config.json, or its dtype is no float of 16 or 32 bits.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"cannot read {path}: {error}", expected="the folder of a model", hint="halfbyte warmup, without a folder"
        ) from None
    quantization = config.get("quantization_config") or {}
    chosen = quantization.get("bnb_4bit_compute_dtype") or config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(chosen).removeprefix("torch.")
    if name not in DTYPES:
        raise ArgumentError(f"dtype in {path} is {name!r}", expected=", ".join(DTYPES))
    return name
