"""Runs Python in a fresh process, where imports and ``sys`` start from nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"


def python(
    words: Sequence[str | Path], *, path: Sequence[Path] = (), cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the interpreter with these words; ``path`` goes before this checkout on PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HALFBYTE_", "PYTHON"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join(str(entry) for entry in (*path, SOURCE)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def python_code(code: str, *, path: Sequence[Path] = (), cwd: Path | None = None, **variables: str) -> str:
    """Standard output of a piece of code that must succeed."""
    done = python(["-c", code], path=path, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
