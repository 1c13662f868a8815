"""LLM.int8() against what bitsandbytes 0.50.2 computed, and where it differs on purpose."""

from functools import cache

import pytest
import torch

import halfbyte.functional as F
from halfbyte.nn import Linear8bitLt
from tests.support.golden import DTYPES, golden
from tests.support.tolerances import TOLERANCES, close, rounding

THRESHOLD = 6.0
THEIR_CONSTANT = 6.200124e-05
"""bitsandbytes' default backend has this for 1/127**2, which is 6.2000124e-05."""


@cache
def saved() -> dict[str, torch.Tensor]:
    return golden("int8/int8")


def layer_from_their_state_dict(threshold: float = THRESHOLD) -> Linear8bitLt:
    rows, columns = saved()["weight"].shape
    layer = Linear8bitLt(columns, rows, has_fp16_weights=False, threshold=threshold)
    prefix = "state."
    layer.load_state_dict({k.removeprefix(prefix): v for k, v in saved().items() if k.startswith(prefix)}, strict=True)
    return layer


def terms(x: torch.Tensor) -> torch.Tensor:
    """Sums of the magnitudes that each output adds up."""
    return x.double().abs() @ saved()["weight.values"].double().abs().t() + saved()["bias"].double().abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9])
def test_codes_statistics_and_outlier_columns_are_equal(rows: int, dtype: str) -> None:
    codes, stats, columns = F.int8_vectorwise_quant(saved()["x"][:rows].to(DTYPES[dtype]), THRESHOLD)
    key = f"quant.{dtype}.{rows}"
    assert torch.equal(codes, saved()[f"{key}.codes"])
    assert torch.equal(stats, saved()[f"{key}.stats"])
    assert torch.equal(columns, saved()[f"{key}.columns"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_without_a_threshold_are_equal(dtype: str) -> None:
    codes, stats, columns = F.int8_vectorwise_quant(saved()["x"].to(DTYPES[dtype]))
    assert torch.equal(codes, saved()[f"quant.{dtype}.plain.codes"])
    assert torch.equal(stats, saved()[f"quant.{dtype}.plain.stats"])
    assert columns is None


def test_an_fp16_weight_becomes_the_same_bytes() -> None:
    rows, columns = saved()["weight"].shape
    layer = Linear8bitLt(columns, rows, has_fp16_weights=False, threshold=THRESHOLD)
    layer.weight.data = saved()["weight"].clone()
    layer.bias.data = saved()["bias"].clone()
    found = layer.to("cpu").state_dict()
    theirs = {key.removeprefix("state."): value for key, value in saved().items() if key.startswith("state.")}
    assert list(found) == ["weight", "bias", "SCB", "weight_format"]
    assert set(found) == set(theirs)
    for key, value in found.items():
        assert value.dtype == theirs[key].dtype
        assert torch.equal(value, theirs[key]), key


def test_dequantized_values_are_equal() -> None:
    assert torch.equal(
        F.int8_vectorwise_dequant(saved()["weight.codes"], saved()["weight.stats"]), saved()["weight.values"]
    )


def test_sums_of_codes_are_equal() -> None:
    codes = saved()["quant.fp16.9.codes"]
    assert torch.equal(F.int8_linear_matmul(codes, saved()["weight.codes"]), saved()["sums"])


def test_scaled_sums_differ_by_their_constant() -> None:
    """bitsandbytes' default backend multiplies by 6.200124e-05, which is 1.8e-5 too much."""
    found = F.int8_scaled_mm(
        saved()["quant.fp16.9.codes"],
        saved()["weight.codes"],
        saved()["quant.fp16.9.stats"],
        saved()["weight.stats"],
        None,
        torch.float32,
    )
    theirs = saved()["scaled.fp32"] - saved()["bias"]
    exact = (
        saved()["sums"].double()
        * saved()["quant.fp16.9.stats"].double()[:, None]
        * saved()["weight.stats"].double()
        / 127**2
    )
    close("ours", found, exact, TOLERANCES["three roundings fp32"], exact.abs())
    size = exact.abs() + saved()["bias"].double().abs()
    close("theirs", theirs, exact * (THEIR_CONSTANT * 127**2), TOLERANCES["three roundings fp32"], size)
    assert (theirs - exact).abs().sum() > 100 * (found - exact).abs().sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_and_mixed_products_agree_but_for_their_constant(dtype: str) -> None:
    A, bias = saved()["x"].to(DTYPES[dtype]), saved()["bias"].to(DTYPES[dtype])
    columns = saved()["quant.fp16.9.columns"]
    steps = (saved()["quant.fp16.9.codes"], saved()["weight.codes"], saved()["quant.fp16.9.stats"])
    found = F.int8_scaled_mm(*steps, saved()["weight.stats"], bias, DTYPES[dtype])
    mixed, apart = F.int8_mixed_scaled_mm(A, *steps, saved()["weight.stats"], columns, bias)
    assert torch.equal(apart, saved()[f"mixed.{dtype}.apart"])
    tolerance = TOLERANCES[f"bitsandbytes int8 {dtype}"]
    close("scaled", found, saved()[f"scaled.{dtype}"], tolerance, terms(A))
    close("mixed", mixed, saved()[f"mixed.{dtype}"], tolerance, terms(A))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
def test_a_layer_gives_one_row_the_same_product(threshold: float, dtype: str) -> None:
    x = saved()["x"][:1].to(DTYPES[dtype])
    found = layer_from_their_state_dict(threshold)(x)
    theirs = saved()[f"layer.{threshold:g}.{dtype}.1"]
    close("layer", found, theirs, TOLERANCES[f"bitsandbytes int8 {dtype}"], terms(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_as_near_to_the_exact_product_as_theirs(dtype: str) -> None:
    """Their outlier columns are those of the batch, ours of each row: the codes differ, the error does not grow."""
    x = saved()["x"].to(DTYPES[dtype])
    exact = x.double() @ saved()["weight.values"].double().t() + saved()["bias"].double()
    found = layer_from_their_state_dict()(x)
    theirs = saved()[f"layer.{THRESHOLD:g}.{dtype}.9"]
    ours, reference = ((out.double() - exact).square().mean().sqrt() for out in (found, theirs))
    assert ours < 1.1 * reference


def test_a_batch_gives_each_row_what_it_gets_alone_where_theirs_does_not() -> None:
    layer, x = layer_from_their_state_dict(), saved()["x"]
    assert torch.equal(layer(x)[:1], layer(x[:1]))
    key = f"layer.{THRESHOLD:g}.fp32"
    assert (saved()[f"{key}.9"][:1] - saved()[f"{key}.1"]).abs().max() > 1e-3


def test_the_gradient_is_equal() -> None:
    x = saved()["x"].clone().requires_grad_()
    layer_from_their_state_dict()(x).backward(torch.ones(9, saved()["weight"].shape[0]))
    size = saved()["weight.values"].double().abs().sum(0).expand_as(x)
    close("gradient", x.grad, saved()["grad"], TOLERANCES["product fp32"], size)


def test_rounding_to_bf16_happens_once() -> None:
    x = saved()["x"].bfloat16()
    layer = layer_from_their_state_dict()
    wide = layer(x.float())
    close("once", layer(x), wide, rounding(torch.bfloat16), wide.abs())


def test_bf16_activations_beyond_fp16_stay_finite_where_theirs_do_not() -> None:
    x = saved()["large"]
    assert not saved()["large.layer"].isfinite().all()
    found = layer_from_their_state_dict(0.0)(x)
    assert found.isfinite().all()
    exact = x.double() @ saved()["weight.values"].double().t()
    assert (found.double() - exact).norm() < 0.03 * exact.norm()


def test_sums_of_many_codes_are_exact_where_theirs_are_not() -> None:
    """bitsandbytes' default backend adds the products in fp32, which has 24 bits."""
    codes = torch.full((1, 8191), 127, dtype=torch.int8)
    codes[0, 0] = 1
    exact = 8190 * 127**2 + 1
    assert F.int8_linear_matmul(codes, codes).item() == exact
    assert saved()["long.sums"].item() != exact
