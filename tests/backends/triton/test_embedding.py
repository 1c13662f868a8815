"""The look-up kernel: under Triton's interpreter what the reference computes; compiled for every architecture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from halfbyte.backends.triton.kernels.embedding import _embedding_4bit_kernel
from tests.backends.triton.compiling import build

TYPES = {
    "indices": "*i64", "packed": "*u8", "absmax": "*fp32", "absmax_8bit": "*u8", "absmax_code": "*fp32",
    "absmax_offset": "*fp32", "pairs": "*i64", "out": "*bf16", "rows": "i32", "columns": "i32", "row_tiles": "i32",
}  # fmt: skip


def test_the_interpreted_kernel_agrees_with_the_reference() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("interpreted_embedding.py")
    child = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=800, check=False
    )
    assert child.returncode == 0, child.stderr[-4000:]
    assert json.loads(child.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_120", "gfx942"])
def test_the_kernel_compiles_and_writes_16_bytes_at_a_time(target: str) -> None:
    constants = {"BLOCKSIZE": 64, "LANES": 128, "NESTED": True}
    built = build(_embedding_4bit_kernel, TYPES, constants, target=target, aligned=("columns", "rows"))
    if target.startswith("sm_"):
        assert built.asm["ptx"].count("st.global.v4.b32") == 1
    else:
        assert built.asm["hsaco"]
