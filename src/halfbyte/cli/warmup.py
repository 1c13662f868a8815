"""``halfbyte warmup``: compile ahead what a model needs, so that its first forward does not wait for it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import ArgumentError

__all__ = ["experts_of", "main", "shapes_of"]

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configurations call the number of experts of a layer."""

DTYPES = ("float32", "bfloat16", "float16")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="halfbyte warmup",
        description="Compile ahead what 4-bit models need on this machine and keep it on disk.",
        epilog="exit status: 0 done, 2 wrong command line",
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        help="folder of a model: compile for its dtype and shapes alone (default: for usual ones)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``halfbyte warmup``; returns 0 done, 2 wrong command line."""
    try:
        options = _parser().parse_args(list(argv))
    except SystemExit as stop:  # argparse has printed its message
        return 0 if stop.code in {0, None} else 2
    config = None if options.model is None else _config_of(options.model)
    names = DTYPES if config is None else (_dtype_of(config),)

    import torch

    from halfbyte.backends import registry

    registry.warmup(print, [getattr(torch, name) for name in names], shapes_of(config or {}), experts_of(config or {}))
    return 0


def _config_of(folder: Path) -> dict[str, Any]:
    """The model's configuration.

    Raises:
        ArgumentError: The folder has no readable config.json.
    """
    path = folder / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ArgumentError(
            f"cannot read {path}: {error}", expected="the folder of a model", hint="halfbyte warmup, without a folder"
        ) from None


def _dtype_of(config: Mapping[str, Any]) -> str:
    """What the model computes in: its 4-bit compute dtype, else its own dtype.

    Raises:
        ArgumentError: Its dtype is no float of 16 or 32 bits.
    """
    quantization = config.get("quantization_config") or {}
    chosen = quantization.get("bnb_4bit_compute_dtype") or config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(chosen).removeprefix("torch.")
    if name not in DTYPES:
        raise ArgumentError(f"dtype in config.json is {name!r}", expected=", ".join(DTYPES))
    return name


def shapes_of(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(out_features, in_features) of the linear layers of a transformer's blocks; empty where it does not say.

    >>> shapes_of({"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2})
    [(32, 64), (64, 64), (64, 128), (128, 64)]
    """
    text = config.get("text_config") or config
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or not heads:
        return []
    head = text.get("head_dim") or hidden // heads
    query, key = heads * head, (text.get("num_key_value_heads") or heads) * head
    found = {(query, hidden), (key, hidden), (hidden, query)}
    dense = not experts_of(config) or text.get("first_k_dense_replace") or text.get("mlp_only_layers")
    if dense and isinstance(text.get("intermediate_size"), int):
        found |= {(text["intermediate_size"], hidden), (hidden, text["intermediate_size"])}
    return sorted(found)


def experts_of(config: Mapping[str, Any]) -> list[tuple[int, int, int, int, bool]]:
    """Stacked weights of a mixture of experts: experts, chosen of them, out_features, in_features, whether with bias.

    >>> experts_of({"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2})
    [(8, 2, 192, 64, False), (8, 2, 64, 96, False)]
    """
    text = config.get("text_config") or config

    def first(*names: str) -> int:
        return next((text[name] for name in names if isinstance(text.get(name), int)), 0)

    count, chosen, hidden = first(*EXPERT_COUNTS), first("num_experts_per_tok"), first("hidden_size")
    width = first("moe_intermediate_size", "intermediate_size")
    if count < 2 or not (chosen and hidden and width):
        return []
    bias = text.get("model_type") == "gpt_oss"
    return [(count, chosen, 2 * width, hidden, bias), (count, chosen, hidden, width, bias)]
