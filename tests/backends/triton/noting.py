"""Launchers that look as if their kernels were compiled, and note what those are started with."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from halfbyte.backends.triton.launch import Launcher

STREAM = 77
Seen = list[tuple[str, Any, dict[str, Any]]]
"""Kernels in the order of their launches: name, grid, arguments by name."""


class _Compiled:
    """Stands for a compiled kernel."""

    def __init__(self, kernel: JITFunction[Any], seen: Seen) -> None:
        self._kernel, self._seen = kernel, seen

    def __call__(self, *given: Any) -> None:
        *grid, stream, function, metadata, _, _, _ = given[:9]
        assert (stream, function, metadata) == (STREAM, "function", "metadata")
        arguments = inspect.signature(self._kernel.fn).bind(*given[9:]).arguments
        self._seen.append((self._kernel.__name__, tuple(grid), dict(arguments)))


def compile_all(owner: Any, seen: Seen) -> None:
    """Give a compiled kernel to every launcher that ``owner`` or its parts hold."""
    for name in owner.__slots__:
        part = getattr(owner, name)
        if isinstance(part, Launcher):
            part._run = _Compiled(part._kernel, seen)
            part._function, part._metadata = "function", "metadata"
        elif type(part).__module__.startswith("halfbyte.") and hasattr(part, "__slots__"):
            compile_all(part, seen)


def compile_on_launch(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Let every kernel's first launch make a compiled one, and run nothing; what those are started with."""
    seen: Seen = []

    def run(kernel: JITFunction[Any], *_: Any, **__: Any) -> Any:
        return SimpleNamespace(function="function", packed_metadata="metadata", run=_Compiled(kernel, seen))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr("halfbyte.backends.triton.launch.DIRECT", True)
    return seen


def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let launches go to :data:`STREAM` of the only GPU, as Triton 3.9 takes them."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)  # noqa: ARG005
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("halfbyte.backends.triton.launch._version", (3, 9))
