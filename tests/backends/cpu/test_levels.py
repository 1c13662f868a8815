"""Every kernel compiles for every CPU, whichever this one is, and uses the instructions that it was written for."""

import itertools
import re

import pytest

from halfbyte.backends.cpu import call, compiler, host
from halfbyte.backends.cpu.kernels.levels import CHUNK, LEVELS
from halfbyte.errors import ArgumentError

TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}
DTYPES = ("f32", "bf16", "f16")
SCALES = ({"nested": False, "halves": False}, {"nested": True, "halves": True})

VARIANTS = {
    "quantize_4bit": [
        {"dtype": d, "coding": c, "buckets": b}
        for d, c in zip(DTYPES, ("rank", "map", "sign"), strict=True)
        for b in (False, True)
    ],
    "dequantize_4bit": [{"dtype": d, **s, "exact": s["halves"]} for d, s in itertools.product(DTYPES, SCALES)],
    "prepare": [{"dtype": d, "tile": 4} for d in DTYPES],
    "product_4bit": [{"dtype": d, **s, "tile": t} for d in DTYPES for s, t in zip(SCALES, (1, 4), strict=True)],
    "quantize_blockwise": [{"dtype": d, "repeats": r} for d in DTYPES for r in (False, True)],
    "dequantize_blockwise": [{"dtype": d} for d in DTYPES],
}
"""The 4-bit and blockwise kernels, each dtype with one scale layout after the other."""


def assembly(name: str, level: str, machine: str = "", **variant: object) -> str:
    found = host.level_named(level)
    _, text = call.write(name, found, variant)
    return compiler.assembly(text, found, TRIPLES[found.machine or machine])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("level", "machine"),
    [(one.name, one.machine) for one in LEVELS if one.machine] + [("portable", m) for m in TRIPLES],
)
def test_kernels_compile_for_every_cpu_and_call_no_function(level: str, machine: str, name: str) -> None:
    """A call (a routine of libm or of the compiler) would not be found when the code is loaded."""
    for variant in VARIANTS[name]:
        if variant.get("buckets") and not host.level_named(level).wide_lookup:
            continue
        text = assembly(name, level, machine, **variant)
        assert "halfbyte_" in text
        assert not re.search(r"\n\s+(call|callq|bl)\s", text)


RANK = {"dtype": "f32", "coding": "rank"}
PLAIN = {"nested": False, "halves": False}
ROWS = {"nested": False, "blocks": 2, "together": 4, "tile": 1}
INSTRUCTIONS = [
    ("product_4bit", "avx512bf16", {"dtype": "bf16", **PLAIN, "tile": 1}, [r"vdpbf16ps\s.*%zmm", r"vpermw\s.*%zmm"]),
    ("product_4bit", "avx512bf16", {"dtype": "f32", **PLAIN, "tile": 1}, [r"vperm(ps|d)\s.*%zmm", r"vfmadd.*%zmm"]),
    ("product_4bit", "avx512", {"dtype": "bf16", **PLAIN, "tile": 4}, [r"vperm(ps|d)\s.*%zmm", r"vfmadd.*%zmm"]),
    ("product_4bit", "avx2", {"dtype": "f32", **PLAIN, "tile": 1}, [r"vpshufb\s.*%ymm", r"vfmadd.*%ymm"]),
    ("product_4bit", "avx2", {"dtype": "bf16", **PLAIN, "tile": 4}, [r"vpshufb\s.*%ymm", r"vfmadd.*%ymm"]),
    ("product_4bit", "neon", {"dtype": "f32", **PLAIN, "tile": 1}, [r"\ttbl\t", r"\tfmla\t"]),
    ("product_4bit", "neon", {"dtype": "bf16", **PLAIN, "tile": 4}, [r"\ttbl\t", r"\tzip1\t", r"\tfmla\t"]),
    ("product_rows", "avx512", {"dtype": "bf16", **ROWS, "pairs": False}, [r"vperm(ps|d)\s.*%zmm", r"vfmadd.*%zmm"]),
    ("product_rows", "avx512bf16", {"dtype": "bf16", **ROWS, "pairs": True}, [r"vpermw\s.*%zmm", r"vdpbf16ps\s.*%zmm"]),
    ("dequantize_4bit", "avx512", {"dtype": "bf16", **PLAIN}, [r"vpermw\s.*%zmm"]),
    ("dequantize_4bit", "avx2", {"dtype": "f16", **PLAIN}, [r"vpshufb\s.*%ymm", r"vcvtps2ph"]),
    ("dequantize_4bit", "neon", {"dtype": "bf16", **PLAIN}, [r"\ttbl\t"]),
    ("quantize_4bit", "avx512", {**RANK, "buckets": True}, [r"vperm[it]2(ps|d)\s.*%zmm", r"vcmp.*%zmm"]),
    ("quantize_4bit", "avx512", {**RANK, "buckets": False}, [r"vperm(ps|d)\s.*%zmm", r"vcmp.*%zmm"]),
    ("quantize_4bit", "avx2", {**RANK, "buckets": False}, [r"vperm(ps|d)\s.*%ymm", r"vcmp.*%ymm"]),
    ("quantize_4bit", "neon", {**RANK, "buckets": False}, [r"\ttbl\t.*\{.*v.*,.*v.*,.*v.*,.*v.*\}"]),
]


@pytest.mark.parametrize(("name", "level", "variant", "patterns"), INSTRUCTIONS)
def test_hot_loops_hold_the_lookup_of_their_cpu(
    name: str, level: str, variant: dict[str, object], patterns: list[str]
) -> None:
    text = assembly(name, level, **variant)
    assert [pattern for pattern in patterns if not re.search(pattern, text)] == []


def test_avx2_code_uses_no_wider_registers() -> None:
    for name, variants in VARIANTS.items():
        assert "%zmm" not in assembly(name, "avx2", **variants[0])


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_hands_out_every_element_of_a_chunk_once(level: object) -> None:
    for dtype in DTYPES:
        assert sorted(level.order(level.kind(dtype))) == list(range(CHUNK))


def test_the_portable_level_runs_everywhere() -> None:
    assert host.levels()[-1].name == "portable"


def test_a_cap_above_the_machine_gives_the_best_that_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CPU_FEATURES", LEVELS[0].name)
    host.level.cache_clear()
    try:
        assert host.level() == host.levels()[0]
    finally:
        host.level.cache_clear()


def test_an_unknown_cap_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CPU_FEATURES", "avx1024")
    host.level.cache_clear()
    with pytest.raises(ArgumentError, match="'avx1024' is unknown; expected one of amx, avx512bf16, avx512, avx2"):
        host.level()
