"""Which keys describe which weight."""

import pytest

from halfbyte.checkpoint import group_by_weight
from halfbyte.checkpoint.keys import weight_of


@pytest.mark.parametrize(
    ("key", "weight"),
    [
        ("weight", None),
        ("bias", None),
        ("a.b.weight", None),
        ("a.b.weight.absmax", "a.b.weight"),
        ("a.b.weight.nested_quant_map", "a.b.weight"),
        ("a.b.weight.quant_state.bitsandbytes__fp4", "a.b.weight"),
        ("weight.absmax", "weight"),
        ("experts.gate_up_proj.quant_map", "experts.gate_up_proj"),
        ("absmax", None),
        ("a.SCB", None),
    ],
)
def test_a_key_names_its_weight(key: str, weight: str | None) -> None:
    assert weight_of(key) == weight


def test_groups_keep_their_order_and_foreign_keys() -> None:
    keys = ["x.weight", "x.weight.quant_map", "y.weight", "x.weight.absmax", "x.weight.odd", "x.bias", "z.norm.weight"]
    assert group_by_weight(keys) == {"x.weight": ["x.weight.quant_map", "x.weight.absmax", "x.weight.odd"]}


def test_a_weight_whose_codes_are_missing_is_still_found() -> None:
    assert group_by_weight(["x.weight.absmax"]) == {"x.weight": ["x.weight.absmax"]}
