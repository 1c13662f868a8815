"""Runs kernels of a CPU that this machine is not: links each call into a static program and gives it to QEMU."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from halfbyte.backends.cpu import call, compiler, host, tables

TOOLS = ("qemu-aarch64-static", "aarch64-linux-gnu-as", "aarch64-linux-gnu-ld")
TRIPLE = "aarch64-unknown-linux-gnu"


def missing() -> list[str]:
    """The tools that are not on PATH."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


class Emulator:
    """Takes the place of ``call.kernel``. Memory that kernels may touch is made known with :meth:`know`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[int, tuple[int, Any]] = {}
        self._object = functools.cache(self._compile)
        self.calls = 0

    def know(self, owner: torch.Tensor | tables.Table) -> Any:
        """Remember a tensor's or table's memory; returns it."""
        if isinstance(owner, torch.Tensor):
            self._known[owner.data_ptr()] = (owner.numel() * owner.element_size(), owner)
        else:
            self._known[owner.address] = (owner.array.nbytes, owner)
        return owner

    def kernel(self, name: str, **variant: Any) -> Any:
        symbol, path = self._object(name, tuple(variant.items()))
        return functools.partial(self._run, symbol, path)

    def _compile(self, name: str, variant: tuple[tuple[str, Any], ...]) -> tuple[str, Path]:
        symbol, text = call.write(name, host.level_named("neon"), dict(variant))
        path = self._folder / f"{symbol}.o"
        path.write_bytes(compiler.object_code(text, host.level_named("neon"), TRIPLE))
        return symbol, path

    def _place(self, word: int) -> tuple[int, int] | None:
        """Start and size of the known memory that holds the address, if it is one."""
        found = (start for start, (size, _) in self._known.items() if start <= word < start + max(1, size))
        start = next(found, None)
        return None if start is None else (start, self._known[start][0])

    def _run(self, symbol: str, path: Path, pieces: int, *arguments: int) -> None:
        buffers: list[tuple[int, int]] = []
        words = [".quad 0", f".quad {pieces}"]
        for word in arguments:
            place = self._place(word) if word else None
            if place is None:
                words.append(f".quad {word}")
                continue
            if place not in buffers:
                buffers.append(place)
            words.append(f".quad buffer{buffers.index(place)} + {word - place[0]}")
        code, data = ["ldr x0, =block", f"bl {symbol}"], []
        for i, (start, size) in enumerate(buffers):
            (self._folder / f"buffer{i}").write_bytes(ctypes.string_at(start, size))
            data += [".align 6", f'buffer{i}: .incbin "{self._folder / f"buffer{i}"}"']
            code += ["mov x0, #1", f"ldr x1, =buffer{i}", f"ldr x2, ={size}", "mov x8, #64", "svc #0"]  # write
        code += ["mov x0, #0", "mov x8, #93", "svc #0"]  # exit
        lines = [".text", ".globl _start", "_start:", *code, ".data", ".align 6", "block:", *words, *data]
        source, linked = self._folder / "call.s", self._folder / "call"
        source.write_text("\n".join(lines) + "\n")
        subprocess.run([TOOLS[1], "-o", f"{linked}.o", source], check=True)
        subprocess.run([TOOLS[2], "-static", "-o", linked, f"{linked}.o", path], check=True, stderr=subprocess.DEVNULL)
        printed = subprocess.run([TOOLS[0], linked], check=True, capture_output=True).stdout
        assert len(printed) == sum(size for _, size in buffers)
        for start, size in buffers:
            ctypes.memmove(start, printed, size)
            printed = printed[size:]
        self.calls += 1
