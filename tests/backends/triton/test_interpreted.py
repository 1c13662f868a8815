"""The plain-Triton kernels under Triton's interpreter, on the CPU, against the reference backend."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CASES = ("quantize", "dequantize", "nested", "columns", "blockwise", "portable", "sum")


@pytest.fixture(scope="module")
def verdicts() -> dict[str, list[str]]:
    """Mismatches per case, from one child: the interpreter is chosen when Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = os.path.join(os.path.dirname(__file__), "interpreted.py")  # noqa: PTH118, PTH120
    child = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=800)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_interpreted_kernel_agrees_with_the_reference(case: str, verdicts: dict[str, list[str]]) -> None:
    assert verdicts[case] == []
