"""Every tolerance of the tests with its reason. A test that needs another number adds a row, or has found a bug."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["TOLERANCES", "Tolerance", "close", "worst"]


@dataclass(frozen=True)
class Tolerance:
    """Greatest error relative to ``scale`` (see :func:`close`), and why it cannot be smaller."""

    relative: float
    reason: str


TOLERANCES: dict[str, Tolerance] = {
    "exact": Tolerance(0.0, "same operations in the same order"),
    "nearest slack": Tolerance(
        3e-7,
        "a value times the fp32 reciprocal of absmax is off by 2 roundings (2^-23), an fp32 midpoint by 2^-25: a code "
        "may be one step from nearest where two levels are equally far to within twice that",
    ),
    "nearest slack, huge": Tolerance(
        1e-6, "the reciprocal of an absmax above 2^126 is subnormal and keeps 21 bits: off by 2^-22 itself"
    ),
    "nearest slack, nested": Tolerance(
        1e-6, "absmax minus its mean is rounded to fp32 before it is scaled: one more 2^-24 of up to 8 times the scale"
    ),
    "nested scale": Tolerance(2**-21, "product, sum and product in fp32, each rounded, relative to scale2 + offset"),
    "published NF4 table": Tolerance(6e-7, "its quantiles were computed in fp32, from fp32 probabilities"),
    "one rounding fp32": Tolerance(
        2**-23, "one fp32 product against float64, and the fp32 level against the exact one"
    ),
    "one rounding bf16": Tolerance(2**-8, "bf16 keeps 8 bits: rounding once is off by half of 2^-7"),
    "one rounding fp16": Tolerance(2**-10, "fp16 keeps 11 bits, its subnormals fewer: rounding once is off by 2^-11"),
    "mean of absmax": Tolerance(2**-22, "fp32 sums of absmax in another order (AVX2, AVX-512, Arm)"),
    "int8 product": Tolerance(
        2**-20,
        "exact integer sums, then fp32: three factors, and outliers summed in any order; relative to sum(|a| |w|)",
    ),
    "bitsandbytes int8 fp32": Tolerance(2e-5, "their constant is 1.8e-5 too large; relative to sum(|a| |w|)"),
    "bitsandbytes int8 bf16": Tolerance(2**-8, "they round the product, the outliers' weight and the sum to bf16"),
    "bitsandbytes int8 fp16": Tolerance(2**-11, "they round the product, the outliers' weight and the sum to fp16"),
    "three roundings fp32": Tolerance(3 * 2**-24, "two constants or scales and a product, each rounded to fp32"),
    "optimizer step fp32": Tolerance(
        25 * 2**-24, "up to 17 fp32 operations and 8 rounded settings, each off by 2^-24 of what the scale gives"
    ),
    "optimizer step": Tolerance(1.0, "the scale is the allowance: one rounding to the dtype and the fp32 operations"),
    "product fp32": Tolerance(1e-5, "fp32 dot products of up to 4096 terms in any order, relative to sum(|a| |w|)"),
    "compiled product fp32": Tolerance(
        1e-5, "compiled code adds and exponentiates in another order, relative to the largest value"
    ),
    "product bf16": Tolerance(2**-7, "weight rounded to bf16, sum in fp32 or bf16 pieces, result rounded to bf16"),
    "product fp16": Tolerance(2**-9, "weight rounded to fp16, sum in fp32 or fp16 pieces, result rounded to fp16"),
    "perplexity int8": Tolerance(
        2e-3, "bitsandbytes' outlier columns are those of the whole batch, ours of each row; it casts to fp16"
    ),
    "perplexity": Tolerance(
        1e-3, "fp32 sums in another order, and bitsandbytes' double-quantized codes are not nearest"
    ),
}


def rounding(dtype: torch.dtype) -> Tolerance:
    """The row for one rounding to ``dtype``."""
    return TOLERANCES[f"one rounding {_SHORT[dtype]}"]


def product(dtype: torch.dtype) -> Tolerance:
    """The row for a matrix product in ``dtype``."""
    return TOLERANCES[f"product {_SHORT[dtype]}"]


_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def worst(actual: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | float) -> float:
    """Largest ``|actual - expected| / scale``, in float64; elements that are equal (or both NaN) count zero."""
    left, right = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert left.shape == right.shape, f"{tuple(left.shape)} is not {tuple(right.shape)}"
    size = torch.as_tensor(scale, dtype=torch.float64).detach().cpu()
    same = (left == right) | (left.isnan() & right.isnan())
    error = torch.where(same, 0.0, (left - right).abs() / size.clamp(min=1e-300))
    return float(error.nan_to_num(nan=float("inf")).max()) if error.numel() else 0.0


def close(
    name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance, scale: torch.Tensor | float
) -> None:
    """Fail, naming the tensor, unless every element is within ``tolerance.relative * scale``."""
    error = worst(actual, expected, scale)
    assert error <= tolerance.relative, f"{name}: error {error:.3g} above {tolerance.relative:.3g} ({tolerance.reason})"
