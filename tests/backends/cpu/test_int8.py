"""LLM.int8() kernels: on every level and number of threads what the reference computes, compiled for every CPU."""

import re
from collections.abc import Callable

import pytest
import torch

from halfbyte.backends.cpu import call, compiler, host, int8
from halfbyte.backends.cpu.kernels.levels import LEVELS, Level
from halfbyte.backends.reference import int8 as reference
from tests.support.hard_inputs import DTYPES
from tests.support.int8_inputs import THRESHOLD, activations, int8_weight
from tests.support.tolerances import TOLERANCES, Tolerance, close, rounding

TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}
LENGTHS = (1, 3, 4, 15, 16, 17, 63, 64, 127, 129, 260, 1025)
VARIANTS = {
    "quantize_int8": [
        {"dtype": d, "width": w, "split": s} for d in ("f32", "bf16", "f16") for w, s in (("i8", False), ("i16", True))
    ],
    "product_int8": [
        {"dtype": "i32", "tile": 1, "split": False, "full": ""},
        {"dtype": "f32", "tile": 1, "split": True, "full": ""},
        {"dtype": "bf16", "tile": 4, "split": True, "full": "f16"},
        {"dtype": "f16", "tile": 2, "split": False, "full": ""},
    ],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", LENGTHS)
def test_codes_are_the_references(level: Level, columns: int, dtype: torch.dtype) -> None:
    A = activations(5, columns, dtype)
    A[3] = 0
    codes, absmax, _ = int8.int8_vectorwise_quant(A)
    expected, scales, _ = reference.int8_vectorwise_quant(A)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, scales)


@pytest.mark.parametrize("columns", LENGTHS)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7])
def test_sums_are_the_references(level: Level, batch: int, columns: int) -> None:
    A, B = int8_weight(batch, columns)[0], int8_weight(19, columns, seed=1)[0]
    assert torch.equal(int8.int8_linear_matmul(A, B), reference.int8_linear_matmul(A, B))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("columns", [1, 17, 64, 300])
@pytest.mark.parametrize("full", [False, True])
def test_products_are_the_references(level: Level, full: bool, columns: int, batch: int, dtype: torch.dtype) -> None:
    A, (CB, SCB) = activations(batch, columns, dtype), int8_weight(13, columns)
    bias, weight = torch.linspace(-1, 1, 13), (CB * SCB[:, None] / 100).to(dtype) if full else None
    found = int8.int8_linear(A, CB, SCB, THRESHOLD, bias, weight)
    expected = reference.int8_linear(A.float(), CB, SCB, THRESHOLD, bias, weight)
    terms = A.double().abs() @ (CB.double().abs() * SCB.double()[:, None] / 100).t() + bias.double().abs()
    allowed = terms * TOLERANCES["int8 product"].relative + expected.double().abs() * rounding(dtype).relative
    close("product", found, expected, Tolerance(1.0, "both rows of the table"), allowed)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_any_number_of_threads_computes_the_same(use_threads: Callable[[int], None], batch: int) -> None:
    A, (CB, SCB) = activations(batch, 260, torch.bfloat16), int8_weight(301, 260)
    found = []
    for count in (1, 2, 7):
        use_threads(count)
        found.append(int8.int8_linear(A, CB, SCB, THRESHOLD))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_every_value_may_be_an_outlier() -> None:
    A, (CB, SCB) = activations(3, 100), int8_weight(9, 100)
    found = int8.int8_linear(A, CB, SCB, 1e-30)
    exact = A.double() @ (CB.double() * SCB.double()[:, None] / 127).t()
    close(
        "product", found, exact, TOLERANCES["product fp32"], A.double().abs() @ (CB * SCB[:, None]).double().abs().t()
    )


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("level_name", "machine"),
    [(one.name, one.machine) for one in LEVELS if one.machine] + [("portable", m) for m in TRIPLES],
)
def test_kernels_compile_for_every_cpu_and_call_no_function(level_name: str, machine: str, name: str) -> None:
    for variant in VARIANTS[name]:
        assert not re.search(r"\n\s+(call|callq|bl)\s", assembly(name, level_name, machine, variant))


@pytest.mark.parametrize(
    ("level_name", "pattern"),
    [("avx512", r"vpmaddwd\s.*%zmm"), ("avx2", r"vpmaddwd\s.*%ymm"), ("neon", r"\ts(ml|ul)")],
)
def test_the_hot_loop_multiplies_pairs_of_codes(level_name: str, pattern: str) -> None:
    variant = {"dtype": "bf16", "tile": 4, "split": True, "full": ""}
    assert re.search(pattern, assembly("product_int8", level_name, "", variant))


def assembly(name: str, level_name: str, machine: str, variant: dict[str, object]) -> str:
    found = host.level_named(level_name)
    _, text = call.write(name, found, variant)
    return compiler.assembly(text, found, TRIPLES[found.machine or machine])
