"""``explain`` names errors that the installed packages really raise, not only texts that were written down."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from halfbyte.doctor.explain import explain

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="these errors need a machine without a GPU")

BUILD = """
from triton.runtime.build import compile_module_from_src
compile_module_from_src(src={source!r}, name="tiny", library_dirs=[], include_dirs=[], libraries=[])
"""


def first(code: str, folder: Path, **environ: str) -> str:
    """The class of the error that a program ends in."""
    kept = {name: value for name, value in os.environ.items() if name not in {"CC", "PYTHONPATH"}}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**kept, "TRITON_CACHE_DIR": str(folder / "cache"), **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    matches = explain(done.stderr)
    return matches[0].entry.id if matches else done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_a_cpu_build_asked_for_cuda(tmp_path: Path):
    assert first("import torch; torch.zeros(1).cuda()", tmp_path) == "A1"


@needs_triton
@needs_no_gpu
def test_triton_without_a_gpu(tmp_path: Path):
    (tmp_path / "kernel.py").write_text(
        "import torch, triton, triton.language as tl\n"
        "@triton.jit\n"
        "def kernel(x):\n"
        "    tl.store(x, 1.0)\n"
        "kernel[(1,)](torch.zeros(1))\n"
    )
    assert first("import runpy; runpy.run_path('kernel.py')", tmp_path) == "D6"


@needs_triton
def test_triton_without_a_compiler(tmp_path: Path):
    assert first(BUILD.format(source="int f;"), tmp_path, PATH=str(tmp_path)) == "D1"


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in compiler is a shell script")
def test_triton_without_headers(tmp_path: Path):
    # A compiler that does not find Python.h is what a Python without headers looks like from here.
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\necho "main.c:1:10: fatal error: Python.h: No such file or directory" >&2\nexit 1\n')
    compiler.chmod(0o755)
    assert first(BUILD.format(source="#include <Python.h>"), tmp_path, CC=str(compiler)) == "D2"


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that nobody can write to")
def test_triton_with_a_cache_that_cannot_be_made(tmp_path: Path):
    assert first(BUILD.format(source="int f;"), tmp_path, TRITON_CACHE_DIR="/proc/nowhere/cache") == "D7"


@needs_triton
def test_a_kernel_without_a_source_file(tmp_path: Path):
    code = "import triton\nexec('@triton.jit\\ndef kernel(x): pass')"
    assert first(code, tmp_path) == "D12"


@needs_triton
def test_a_folder_that_hides_triton(tmp_path: Path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("")
    assert first("import triton.language", tmp_path) == "C12"


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_file_that_hides_a_package(tmp_path: Path, name: str):
    (tmp_path / f"{name}.py").write_text(f"import {name}\n{name}.language\n")
    assert first(f"import {name}", tmp_path) == "C12"
    (tmp_path / f"{name}.py").write_text("")
    assert first(f"import {name}.language", tmp_path) == "C12"


def test_a_file_that_hides_bitsandbytes(tmp_path: Path):
    (tmp_path / "bitsandbytes.py").write_text("")
    assert first("import bitsandbytes.nn", tmp_path) == "E4"


@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
def test_numba_without_a_place_for_its_cache(tmp_path: Path):
    code = "import numba\nexec(compile('@numba.njit(cache=True)\\ndef f(x): return x', '/proc/nowhere/f.py', 'exec'))"
    assert first(code, tmp_path, HOME="/proc/nowhere", XDG_CACHE_HOME="/proc/nowhere") == "D14"


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_metadata_that_is_not_there(tmp_path: Path):
    assert first("import importlib.metadata as m; m.version('bitsandbytes')", tmp_path) == "E5"
