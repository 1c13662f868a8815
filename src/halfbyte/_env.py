"""Every ``HALFBYTE_*`` environment variable: name, type, default, meaning. The only place that reads them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from halfbyte.errors import ArgumentError

__all__ = ["VARIABLES", "Variable", "cache_dir", "get", "parse"]

T = TypeVar("T", str, int, bool)


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable. ``kind`` parses it; ``doc`` goes into the documentation table."""

    name: str
    kind: type[T]
    default: T
    doc: str


VARIABLES: tuple[Variable[str] | Variable[int] | Variable[bool], ...] = (
    Variable(
        "HALFBYTE_BACKEND", str, "", "Use only this backend (`reference`, `cpu`, `triton`); empty picks the best."
    ),
    Variable("HALFBYTE_NUM_THREADS", int, 0, "Threads of the CPU kernels; 0 follows torch."),
    Variable(
        "HALFBYTE_CPU_FEATURES",
        str,
        "",
        "Highest CPU level of the kernels: `amx`, `avx512bf16`, `avx512`, `avx2`, `neon`, `portable`; empty picks.",
    ),
    Variable(
        "HALFBYTE_CACHE_DIR", str, "", "Where downloads and compiled kernels go; empty: the user's cache directory."
    ),
    Variable(
        "HALFBYTE_QUANTIZE_EMBEDDINGS",
        bool,
        False,
        "Quantize embedding tables and output heads too when transformers loads a model in 4 or 8 bits.",
    ),
    Variable(
        "HALFBYTE_QUANTIZE_EXPERTS",
        bool,
        True,
        "Whether transformers' `load_in_4bit` takes fused experts along; 0 leaves them in their dtype.",
    ),
    Variable("HALFBYTE_QUIET", bool, False, "No receipt line after a model is loaded."),
)

_BY_NAME = {variable.name: variable for variable in VARIABLES}


def get(name: str) -> str | int | bool:
    """Value of one variable, parsed; the default when it is unset or empty.

    Raises:
        ArgumentError: The value does not parse.

    >>> get("HALFBYTE_NUM_THREADS") >= 0
    True
    """
    return parse(name, os.environ.get(name, ""))


def parse(name: str, text: str) -> str | int | bool:
    """What ``text`` means for that variable; its default for empty text.

    Raises:
        ArgumentError: It does not parse.

    >>> parse("HALFBYTE_QUIET", "yes"), parse("HALFBYTE_QUIET", "")
    (True, False)
    """
    variable = _BY_NAME[name]
    text = text.strip()
    if not text:
        return variable.default
    if variable.kind is bool:
        if text.lower() in {"1", "true", "yes", "on"}:
            return True
        if text.lower() in {"0", "false", "no", "off"}:
            return False
        raise ArgumentError(f"{name}={text!r}", expected="1 or 0", hint=f"unset {name}")
    if variable.kind is int:
        try:
            return int(text)
        except ValueError:
            raise ArgumentError(f"{name}={text!r}", expected="a whole number", hint=f"unset {name}") from None
    return text


def cache_dir() -> Path:
    """Where halfbyte keeps what it downloads and compiles: ``HALFBYTE_CACHE_DIR``, else the user's cache directory.

    Returns:
        The path; it need not exist yet.
    """
    chosen = str(get("HALFBYTE_CACHE_DIR"))
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "halfbyte"
