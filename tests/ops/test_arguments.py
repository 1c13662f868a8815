"""What no backend could compute is refused before one is asked: one readable error each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import halfbyte.functional as F
from halfbyte.errors import ArgumentError, HalfbyteError
from tests.support.hard_inputs import weights

ops = torch.ops.halfbyte
CODE = F.create_dynamic_map()


def codes_of(shape: tuple[int, ...] = (8, 64)) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.quantize_4bit(weights(8 * 64).view(shape), 64, "nf4", torch.uint8)


def dequantize(**changes: Any) -> Any:
    B, absmax = codes_of()
    named: dict[str, Any] = {
        "A": B,
        "absmax": absmax,
        "blocksize": 64,
        "quant_type": "nf4",
        "shape": [8, 64],
        "dtype": torch.float32,
    }
    return ops.dequantize_4bit(**{**named, **changes})


def gemm(**changes: Any) -> Any:
    B, absmax = codes_of()
    named: dict[str, Any] = {
        "A": torch.zeros(2, 64),
        "B": B,
        "shapeB": [8, 64],
        "absmax": absmax,
        "blocksize": 64,
        "quant_type": "nf4",
    }
    return ops.gemm_4bit(**{**named, **changes})


def blockwise(**changes: Any) -> Any:
    named: dict[str, Any] = {
        "A": torch.zeros(100, dtype=torch.uint8),
        "absmax": torch.ones(2),
        "code": CODE,
        "blocksize": 64,
        "dtype": torch.float32,
    }
    return ops.dequantize_blockwise(**{**named, **changes})


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "integer weight": (lambda: ops.quantize_4bit(torch.zeros(8, dtype=torch.int32), 64, "nf4", torch.uint8), "int32"),
    "double weight": (lambda: ops.quantize_4bit(torch.zeros(8).double(), 64, "nf4", torch.uint8), "float64"),
    "blocksize": (lambda: ops.quantize_4bit(torch.zeros(8), 48, "nf4", torch.uint8), "blocksize is 48"),
    "type": (lambda: ops.quantize_4bit(torch.zeros(8), 64, "nf5", torch.uint8), "'nf5' is unknown"),
    "storage": (lambda: ops.quantize_4bit(torch.zeros(8), 64, "nf4", torch.int64), "quant_storage is torch.int64"),
    "bytes that do not fill the storage": (
        lambda: ops.quantize_4bit(torch.zeros(6), 64, "nf4", torch.float32),
        "6 values take 3 bytes",
    ),
    "too few codes": (lambda: dequantize(A=codes_of()[0][:100]), "holds 100 bytes; expected 256 for 512 values"),
    "another shape": (lambda: dequantize(shape=[8, 32]), "holds 256 bytes; expected 128"),
    "absmax of another blocksize": (lambda: dequantize(blocksize=128), "absmax has 8 values; expected 4"),
    "absmax in bf16": (lambda: dequantize(absmax=torch.ones(8, dtype=torch.bfloat16)), "absmax is torch.bfloat16"),
    "integer output": (lambda: dequantize(dtype=torch.int32), "output dtype is torch.int32"),
    "half a nested state": (lambda: dequantize(absmax_8bit=torch.zeros(8, dtype=torch.uint8)), "expected all three"),
    "nested codes that are no bytes": (
        lambda: dequantize(absmax_8bit=torch.zeros(8), absmax_code=CODE, absmax_offset=torch.zeros(())),
        "absmax_8bit is torch.float32",
    ),
    "nested scales too many": (
        lambda: dequantize(
            absmax_8bit=torch.zeros(8, dtype=torch.uint8), absmax_code=CODE, absmax_offset=torch.zeros(())
        ),
        "second-level absmax has 8 values; expected 1",
    ),
    "activation of another width": (lambda: gemm(A=torch.zeros(2, 65)), "expected 64 as the activation's last"),
    "scalar activation": (lambda: gemm(A=torch.zeros(())), "activation of shape"),
    "integer activation": (lambda: gemm(A=torch.zeros(2, 64, dtype=torch.int64)), "the activation is torch.int64"),
    "weight shape of three dimensions": (lambda: gemm(shapeB=[2, 4, 64]), "expected two dimensions"),
    "bias of another dtype": (lambda: gemm(bias=torch.zeros(8, dtype=torch.float16)), "bias is torch.float16"),
    "bias of another length": (lambda: gemm(bias=torch.zeros(7)), r"shape \(7,\)"),
    "code map of another length": (lambda: blockwise(code=torch.zeros(16)), "16 values; expected float32 with 256"),
    "codes that are no bytes": (lambda: blockwise(A=torch.zeros(100)), "codes are torch.float32"),
    "blockwise blocksize": (lambda: blockwise(blocksize=0), "blocksize is 0; expected 1 or more"),
    "blockwise absmax": (lambda: blockwise(absmax=torch.ones(3)), "absmax has 3 values; expected 2"),
    "out of another dtype": (
        lambda: ops.dequantize_4bit.out(
            *codes_of(), 64, "nf4", [8, 64], torch.float32, out=torch.zeros(8, 64, dtype=torch.float16)
        ),
        r"out is torch.float16 \(8, 64\) on cpu; expected torch.float32",
    ),
    "out of another shape": (
        lambda: ops.dequantize_4bit.out(*codes_of(), 64, "nf4", [8, 64], torch.float32, out=torch.zeros(64, 8)),
        r"\(64, 8\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_argument_is_one_readable_error(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ArgumentError, match=message):
        call()


@pytest.mark.parametrize("case", REFUSED)
def test_argument_errors_are_value_errors_that_say_what_was_expected(case: str) -> None:
    with pytest.raises(ValueError) as caught:
        REFUSED[case][0]()
    assert isinstance(caught.value, HalfbyteError)
    assert "expected" in str(caught.value)


def test_an_out_of_the_wrong_shape_stays_as_it_was() -> None:
    out = torch.full((64, 8), 7.0)
    with pytest.raises(ArgumentError):
        ops.dequantize_4bit.out(*codes_of(), 64, "nf4", [8, 64], torch.float32, out=out)
    assert (out == 7.0).all()
