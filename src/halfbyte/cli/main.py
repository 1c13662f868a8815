"""Finds the command that was typed and hands it the rest of the line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from halfbyte._version import __version__
from halfbyte.errors import HalfbyteError

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, str] = {
    "bench": "time 4-bit layers on this machine; `bench tune` measures tiles for its GPU",
    "demo": "load a small real model in 4 bits, show receipt, answer, perplexity, memory and time",
    "doctor": "check and prove this environment (also without a command)",
    "explain": "name the cause and the command for an error text or a check code",
    "merge": "merge an adapter into a checkpoint and tell how much of it survived the rounding",
    "run": "run a script or module with halfbyte in the place of bitsandbytes",
    "warmup": "compile ahead what a model needs",
}
"""Command -> one line of help. Each is a module of this package with ``main(argv) -> exit code``."""

USAGE = "usage: halfbyte [command] [options]\n\n" + "\n".join(f"  {name:<8}  {text}" for name, text in COMMANDS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the process exit code (2 for a wrong command line)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in {"-h", "--help"}:
        print(USAGE + "\n\n`halfbyte COMMAND --help` tells more; options without a command go to the doctor.")
        return 0
    if words and words[0] in {"-V", "--version"}:
        print(f"halfbyte {__version__}")
        return 0
    command = words.pop(0) if words and not words[0].startswith("-") else "doctor"
    if command not in COMMANDS:
        print(f"halfbyte: unknown command {command!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(f"halfbyte.cli.{command}").main(words))
    except HalfbyteError as error:
        print(f"halfbyte {command}: {error}", file=sys.stderr)
        return 2
