"""The optimizer kernel: under Triton's interpreter against the reference, and compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
import triton.language as tl

from halfbyte.backends.triton.kernels.optimizer import _optimizer_kernel
from halfbyte.backends.triton.optimizer import table_of
from halfbyte.backends.triton.rules import function_of, source_of
from halfbyte.rules import rule_named, rule_names
from tests.backends.triton.compiling import build

CASES = [*rule_names(), "fp16", "blocks of 2048", "random", "skip zeros"]
NUMBERS = [f"{what}{i}" for what in ("low", "high", "shift") for i in range(3)]


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    """Largest difference by case, from one child: the interpreter is chosen when Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "interpreted_optimizer.py"
    child = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=800)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_interpreted_kernel_agrees_with_the_reference(case: str, differences: dict[str, float]) -> None:
    assert differences[case] == 0.0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("eight", [True, False])
@pytest.mark.parametrize("rule", ["adam", "ademamix", "lion", "adopt"])
def test_the_kernel_compiles(rule: str, eight: bool, target: str) -> None:
    types = {
        "table": "*i64",
        "tensors": "i32",
        "hyper": "*fp32",
        "seed": "i32",
        **{f"code{i}": "*fp32" for i in range(3)},
        **{f"ranks{i}": "*i32" for i in range(3)},
        **dict.fromkeys(NUMBERS, "i32"),
    }
    constants = {
        "RULE": function_of(rule),
        "STATES": len(rule_named(rule).signed),
        "COUPLED": rule_named(rule).decay == "coupled",
        "P": tl.bfloat16,
        "G": tl.float32,
        "EIGHT": eight,
        "SKIP_ZEROS": False,
        "RANDOM": True,
        "BLOCKSIZE": 256 if eight else 1024,
        "ROWS": 4 if eight else 1,
    }
    built = build(_optimizer_kernel, types, constants, target=target, enable_fp_fusion=False)
    assert built.registers_spilled <= 16


def test_a_rule_keeps_its_code_and_loses_its_container() -> None:
    source = source_of("adam")
    assert "h." not in source
    assert "m = beta1 * m + rest1 * g" in source


def test_programs_are_counted_tensor_by_tensor() -> None:
    params = [torch.zeros(1000), torch.zeros(0), torch.zeros(1025)]
    states = [torch.zeros_like(p) for p in params]
    words, programs = table_of([0, 2], params, params, states, [], 1, 1024)
    assert programs == 3
    assert words[:, 8:].tolist() == [[1000, 0], [1025, 1]]
    assert words[:, 0].tolist() == [params[0].data_ptr(), params[2].data_ptr()]
