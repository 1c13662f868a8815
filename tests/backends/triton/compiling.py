"""Compiling the kernels for a GPU that is not there: PTX, SASS, and instructions of the hot loop by class."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Built:
    """A compiled kernel: its assembly texts, dynamic shared memory, and the loop's instructions (NVIDIA only)."""

    asm: dict[str, Any]
    shared: int
    loop: Counter[str]
    registers_spilled: int

    @property
    def instructions(self) -> int:
        return sum(self.loop.values())


def build(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    target: str,
    warps: int = 4,
    gluon: bool = False,
    aligned: tuple[str, ...] = (),
    **options: Any,
) -> Built:
    """Compile ``kernel`` for ``"sm_90"`` or ``"gfx942"``; pointers and the integers in ``aligned`` divide by 16."""
    order = list(kernel.arg_names)
    signature = {name: types.get(name, "constexpr") for name in order}
    attributes = {
        (order.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") or name in aligned
    }
    source = (GluonASTSource if gluon else ASTSource)(
        fn=kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target[3:]), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
    compiled = triton.compile(source, target=gpu, options={"num_warps": warps, **options})
    if not target.startswith("sm_"):
        return Built(compiled.asm, compiled.metadata.shared, Counter(), 0)
    sass, spilled = _disassemble(compiled.asm["cubin"])
    return Built(compiled.asm, compiled.metadata.shared, _loop(sass), spilled)


def _disassemble(cubin: bytes) -> tuple[str, int]:
    descriptor, name = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(cubin)
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", name], capture_output=True, text=True, check=True).stdout
        usage = [TOOLS / "cuobjdump", "--dump-resource-usage", name]
        report = subprocess.run(usage, capture_output=True, text=True, check=True).stdout
    finally:
        Path(name).unlink()
    stack = re.search(r"STACK:(\d+)", report)
    return sass, int(stack.group(1)) if stack else 0


_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


def _loop(sass: str) -> Counter[str]:
    """Opcodes between the longest backward branch and its target."""
    lines = sass.splitlines()
    labels = {line.strip()[:-1]: i for i, line in enumerate(lines) if re.match(r"\.L_x_\d+:", line.strip())}
    best = (0, 0)
    for i, line in enumerate(lines):
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if branch:
            start = labels.get(branch.group(1), i)
            if i - start > best[1] - best[0]:
                best = (start, i)
    found = (_INSTRUCTION.match(line) for line in lines[best[0] : best[1] + 1])
    return Counter(match.group(1) for match in found if match and match.group(1) not in {"NOP", "BRA", "EXIT"})
