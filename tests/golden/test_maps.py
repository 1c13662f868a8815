"""Code maps by value."""

import pytest
import torch

import halfbyte.functional as F
from tests.support.golden import golden

MAPS = {
    "dynamic.signed": lambda: F.create_dynamic_map(),
    "dynamic.unsigned": lambda: F.create_dynamic_map(signed=False),
    "normal.extra": lambda: F.create_normal_map(),
    "normal.symmetric": lambda: F.create_normal_map(use_extra_value=False),
    "linear.signed": lambda: F.create_linear_map(),
    "linear.unsigned": lambda: F.create_linear_map(signed=False),
    "linear.no_zero": lambda: F.create_linear_map(add_zero=False),
    **{
        f"dynamic.signed.{bits}": (lambda bits=bits: F.create_dynamic_map(True, bits - 1, bits)) for bits in range(3, 8)
    },
    **{f"linear.signed.{bits}": (lambda bits=bits: F.create_linear_map(True, bits)) for bits in range(3, 8)},
    **{f"fp8.e{e}m{m}": (lambda e=e, m=m: F.create_fp8_map(True, e, m)) for e, m in ((5, 2), (4, 3), (3, 4), (2, 5))},
    "fp8.unsigned": lambda: F.create_fp8_map(False, 5, 3),
    "nf4": lambda: F.get_4bit_type("nf4", "cpu"),
    "fp4": lambda: F.get_4bit_type("fp4", "cpu"),
    "af4": lambda: F.get_4bit_type("af4", "cpu"),
}


def test_every_golden_map_is_compared() -> None:
    assert set(MAPS) == set(golden("maps"))


@pytest.mark.parametrize("name", MAPS)
def test_values_are_equal(name: str) -> None:
    made = MAPS[name]()
    assert made.dtype == torch.float32
    assert torch.equal(made, golden("maps")[name])
