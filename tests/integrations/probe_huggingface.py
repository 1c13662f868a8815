"""Walks every name of bitsandbytes that Hugging Face's libraries touch, with halfbyte in its place; prints a table.

Run: ``halfbyte run tests/integrations/probe_huggingface.py``. What is walked is read from the source of those libraries
that are installed, and from the list below for those that are not.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIBRARIES = ("transformers", "peft", "accelerate", "trl", "diffusers")

ALWAYS = {
    "__version__": str,
    "features": set,
    "supported_torch_devices": set,
    "nn.Linear4bit": type,
    "nn.Linear8bitLt": type,
    "nn.Params4bit": type,
    "nn.Int8Params": type,
    "nn.modules.Params4bit": type,
    "functional.QuantState": type,
    "functional.dequantize_4bit": callable,
    "functional.dequantize_blockwise": callable,
    "functional.int8_vectorwise_dequant": callable,
    "functional.quantize_4bit": callable,
    "matmul": callable,
    "matmul_4bit": callable,
    "MatmulLtState": type,
    "optim.AdEMAMix": type,
    "optim.Adagrad": type,
    "optim.Adagrad32bit": type,
    "optim.AdamW": type,
    "optim.AdamW32bit": type,
    "optim.GlobalOptimManager": type,
    "optim.GlobalOptimManager.get_instance": callable,
    "optim.Lion": type,
    "optim.Lion32bit": type,
    "optim.RMSprop": type,
}
"""What transformers 5.23, peft 0.21, accelerate 1.15, diffusers 0.42, trl 1.16 and vLLM touch, and what it must be."""


def touched(library: str) -> Iterator[tuple[str, str]]:
    """(dotted name below bitsandbytes, file) that the source of an installed library uses."""
    spec = importlib.util.find_spec(library)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).rglob("*.py")):
            text = file.read_text(encoding="utf-8", errors="replace")
            if "bitsandbytes" in text or "bnb." in text:
                for name in _names(ast.parse(text)):
                    yield name, f"{library}/{file.relative_to(folder)}"


def _is_theirs(node: ast.ImportFrom) -> bool:
    return node.level == 0 and (node.module or "").partition(".")[0] == "bitsandbytes"


def _names(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    aliases = {"bnb": "", "bitsandbytes": ""}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "bitsandbytes":
                    below = alias.name.partition(".")[2]
                    aliases[alias.asname or "bitsandbytes"] = below if alias.asname else ""
                    found.add(below)
        if isinstance(node, ast.ImportFrom) and _is_theirs(node):
            below = node.module.partition(".")[2] if node.module else ""
            found |= {f"{below}.{alias.name}".lstrip(".") for alias in node.names}
    for node in ast.walk(tree):
        chain: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        if chain and isinstance(inner, ast.Name) and inner.id in aliases:
            found.add(".".join([aliases[inner.id], *chain]).lstrip("."))
    return found - {""}


def value_of(name: str) -> Any:
    """``bitsandbytes.<name>``, importing modules on the way.

    Raises:
        AttributeError: There is no such name.
    """
    value = importlib.import_module("bitsandbytes")
    for part in name.split("."):
        value = getattr(value, part)
    return value


def is_what(value: Any, what: Any) -> bool:
    """Whether the value is of that kind."""
    if what is type:
        return inspect.isclass(value)
    return callable(value) if what is callable else isinstance(value, what)


def main() -> int:
    """Walk all; 1 if one is missing or of another kind."""
    failures = 0
    rows = [(name, "listed") for name in ALWAYS]
    for library in LIBRARIES:
        rows += touched(library)
    for name, where in sorted(set(rows)):
        try:
            value = value_of(name)
            ok = name not in ALWAYS or is_what(value, ALWAYS[name])
            kind = "class" if inspect.isclass(value) else type(value).__name__
        except (AttributeError, ImportError) as error:
            ok, kind = False, str(error).splitlines()[0]
        failures += not ok
        print(f"{'ok' if ok else 'MISSING'}\t{name}\t{kind}\t{where}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
