"""The optimizer kernel: under Triton's interpreter against the reference, and compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

pytest.importorskip("triton")

import numpy as np
import torch
import triton.language as tl

from halfbyte.backends.triton.kernels import optimizer as kernels
from halfbyte.backends.triton.kernels.optimizer import _optimizer_kernel
from halfbyte.backends.triton.optimizer import MOST_ROWS, VALUES, plan
from halfbyte.backends.triton.rules import function_of, source_of
from halfbyte.formats.dynamic import dynamic_map
from halfbyte.rules import FIELDS, encoding_map, rule_named, rule_names
from tests.backends.triton.compiling import build

CASES = [*rule_names(), "fp16", "blocks of 2048", "random", "skip zeros", "another map"]


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
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("eight", [True, False])
@pytest.mark.parametrize("rule", ["adam", "ademamix", "lion", "adopt"])
def test_the_kernel_compiles(rule: str, eight: bool, masked: bool, target: str) -> None:
    nvidia, signed = target.startswith("sm_"), rule_named(rule).signed
    types = {
        "table": "*i64",
        "owners": "*i32",
        "hyper": "*fp32",
        "seed": "i32",
        **{f"code{i}": "*fp32" for i in range(3)},
        **{f"cuts{i}": "*fp32" for i in range(3)},
        **dict.fromkeys(FIELDS, "fp32"),
    }
    constants = {
        "RULE": function_of(rule, nvidia),
        "STATES": len(signed),
        **{f"KIND{i}": (1 if one else 2) for i, one in enumerate((*signed, *[True] * (3 - len(signed))))},
        "COUPLED": rule_named(rule).decay == "coupled",
        "P": tl.bfloat16,
        "G": tl.float32,
        "EIGHT": eight,
        "MASKED": masked,
        "SKIP_ZEROS": False,
        "RANDOM": True,
        "LOADED": masked,
        "PTX": nvidia,
        "BLOCKSIZE": 256 if eight else 1024,
        "ROWS": 4 if eight else 1,
    }
    built = build(_optimizer_kernel, types, constants, target=target, enable_fp_fusion=False)
    # The masked kernel serves the ends of tensors only.
    assert built.registers_spilled <= (64 if masked else 16)


def halves(text: str) -> np.ndarray:
    """Both halves of a constant of the assembly are the same number."""
    return np.asarray([int(text, 16) & 0xFFFF], np.uint16).view(np.float16)[0]


def guessed(x: np.ndarray, assembly: str) -> np.ndarray:  # noqa: C901  # a case an instruction
    """The assembly, line by line, one value in each half, by numpy's half precision."""
    constant, other = np.float16(0), np.float16(0)
    values: dict[str, np.ndarray] = {}
    sign = np.where(np.signbit(x), np.float16(-1), np.float16(1))
    for part in assembly.replace("\n", " ").split(";"):
        words = part.replace(",", " ").replace("{", " ").replace("}", " ").split()
        match words:
            case ["cvt.rn.f16x2.f32", to, *_]:
                values[to] = x.astype(np.float16)
            case ["mov.b32", "c", number]:
                constant = halves(number)
            case ["mov.b32", "d", number]:
                other = halves(number)
            case ["mov.b32", to, source]:
                values[to] = values[source]
            case ["mul.rn.f16x2", to, source, "c"]:
                values[to] = values[source] * constant
            case ["and.b32", "a", source, "0x7FFF7FFF"]:
                values["a"] = np.abs(values[source])
            case ["fma.rn.f16x2", to, source, "c", "d"]:
                # One rounding: halves and their products are exact in fp64.
                values[to] = (values[source].astype(np.float64) * float(constant) + float(other)).astype(np.float16)
            case ["min.f16x2", "n", "n", "t"]:
                values["n"] = np.minimum(values["n"], values["t"])
            case ["xor.b32", "n", "n", "s"]:
                values["n"] = values["n"] * sign
            case ["add.rn.f16x2", "n", "n", "c"]:
                values["n"] = values["n"] + constant
            case [".reg", *_] | ["and.b32", "s", *_] | ["and.b32", "$0", *_] | ["bfe.u32", *_] | []:
                pass
            case _:
                raise AssertionError(part)
    return values["n"].view(np.uint16).astype(np.int64) & 0xFF


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("signed", [True, False])
def test_the_guess_is_the_code_or_one_more(signed: bool) -> None:
    levels = dynamic_map(signed)
    apart = encoding_map(levels)
    middles = (apart[:-1] + apart[1:]) * np.float32(0.5)
    every = np.arange(0x2F800000, 0x3F800001, 1 << 8, dtype=np.int32).view(np.float32)
    around = [np.nextafter(middles, np.float32(side)) for side in (-2, 2)]
    x = np.concatenate(
        [
            np.asarray([0.0, 1e-45, 1e-30, 1e-8, 1e-7, 1.0], np.float32),
            np.abs(np.concatenate([middles, *around])),
            every,
        ]
    )
    if signed:
        x = np.concatenate([x, -x])
    excess = guessed(x, kernels._assembly(signed)) - np.searchsorted(middles, x, side="left")
    assert set(np.unique(excess)) == {0, 1}


def test_a_rule_keeps_its_code_and_loses_its_container() -> None:
    source = source_of("adam")
    assert "h." not in source
    assert "m = beta1 * m + rest1 * g" in source


def test_whole_programs_and_the_rest_are_launched_apart() -> None:
    addresses = [*(16 * word for word in range(1, 6)), 0, 0, 0]
    words = np.asarray([addresses, addresses, [1, *addresses[1:]]], np.int64)
    whole, rest = plan(words.tobytes(), (3 * VALUES, 2 * VALUES + 1, VALUES), VALUES, torch.device("cpu"))
    assert (whole.masked, rest.masked) == (False, True)
    assert whole.owners.tolist() == [0, 0, 0, 1, 1]
    assert rest.owners.tolist() == [1, 2]
    assert whole.table[:, 9].tolist()[:2] == [0, 3]
    # Its first program is the third of the second tensor.
    assert rest.table[:, 9].tolist()[1:] == [-2, 1]
    assert whole.table[1, :9].tolist() == [*addresses, 2 * VALUES + 1]


def test_tables_of_gradients_that_move_are_let_go_and_those_that_stay_are_kept() -> None:
    device, sizes = torch.device("cpu"), (VALUES,) * 1000

    def at(place: int) -> bytes:
        return np.full((1000, 8), 16 * place, np.int64).tobytes()

    first = weakref.ref(plan(at(1), sizes, VALUES, device)[0].table)
    owners = plan(at(1), sizes, VALUES, device)[0].owners
    assert plan(at(1), sizes, VALUES, device)[0].table is first()
    used = plan(at(0), sizes, VALUES, device)
    for place in range(2, 20):
        assert plan(at(0), sizes, VALUES, device) is used
        (launch,) = plan(at(place), sizes, VALUES, device)
        assert launch.owners is owners
    assert first() is None
    large = (VALUES,) * (MOST_ROWS + 1)
    addresses = np.full((len(large), 8), 16, np.int64).tobytes()
    assert plan(addresses, large, VALUES, device) is plan(addresses, large, VALUES, device)
