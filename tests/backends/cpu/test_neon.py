"""The NEON kernels, run by QEMU where it is installed, against the reference."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.backends.cpu import blockwise, four_bit, fused, host, matmul, memory, tables
from halfbyte.backends.reference import blockwise as reference8
from halfbyte.backends.reference import four_bit as reference
from halfbyte.formats import codebook_names
from halfbyte.formats.dynamic import dynamic_map
from tests.backends.cpu import emulated
from tests.support.hard_inputs import DTYPES, weights
from tests.support.tolerances import close, product

pytestmark = pytest.mark.skipif(bool(emulated.missing()), reason=f"not installed: {', '.join(emulated.missing())}")


@pytest.fixture
def neon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[emulated.Emulator]:
    """Every kernel call of the test runs on an emulated Arm CPU."""
    machine = emulated.Emulator(tmp_path)
    monkeypatch.setattr(host, "level", lambda: host.level_named("neon"))
    for module in (four_bit, fused, blockwise):
        monkeypatch.setattr(module, "kernel", machine.kernel)
    for make in ("empty", "empty_strided", "zeros"):
        real = getattr(torch, make)
        monkeypatch.setattr(torch, make, lambda *a, _real=real, **k: machine.know(_real(*a, **k)))
    monkeypatch.setattr(fused, "scratch", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8).data_ptr())
    for kept in (fused._chunk_kernels, memory.maker, matmul._planned):
        kept.cache_clear()
    for name in ("search", "buckets", "lookup_of"):
        monkeypatch.setattr(tables, name, _known(getattr(tables, name), machine))
    yield machine
    for kept in (fused._chunk_kernels, memory.maker, matmul._planned):
        kept.cache_clear()
    assert machine.calls > 0


def _known(real: Any, machine: emulated.Emulator) -> Any:
    def found(key: Any) -> Any:
        made = real(key)
        machine.know(made if isinstance(made, tables.Table) else made.table)
        return made

    return found


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", codebook_names(4))
def test_codes_and_values_are_the_references(neon: emulated.Emulator, kind: str, dtype: torch.dtype) -> None:
    for blocksize in (32, 64):
        A = neon.know(weights(1000, dtype))
        A[70] = float("inf")
        packed, absmax = four_bit.quantize_4bit(A, blocksize, kind, torch.uint8)
        expected, scales = reference.quantize_4bit(A, blocksize, kind, torch.uint8)
        same(packed, expected)
        same(absmax, scales)
        for out in DTYPES:
            arguments = (packed, absmax, blocksize, kind, (1000,), out)
            same(four_bit.dequantize_4bit(*arguments), reference.dequantize_4bit(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64])
def test_products_are_within_rounding(neon: emulated.Emulator, blocksize: int, dtype: torch.dtype) -> None:
    packed, absmax = map(neon.know, reference.quantize_4bit(weights(13 * 192), blocksize, "nf4", torch.uint8))
    weight = reference.dequantize_4bit(packed, absmax, blocksize, "nf4", (13, 192), torch.float32).double()
    for batch in (1, 2, 3):
        x = neon.know(torch.randn(batch, 192).to(dtype))
        out = matmul.gemm_4bit(x, packed, (13, 192), absmax, blocksize, "nf4")
        close("product", out, x.double() @ weight.T, product(dtype), x.double().abs() @ weight.T.abs())


@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bit_codes_and_values_are_the_references(neon: emulated.Emulator, dtype: torch.dtype) -> None:
    A, code = neon.know(weights(700, dtype)), neon.know(torch.from_numpy(dynamic_map()).clone())
    codes, absmax = blockwise.quantize_blockwise(A, code, 64)
    expected, scales = reference8.quantize_blockwise(A, code, 64)
    same(codes, expected)
    same(absmax, scales)
    arguments = (codes, absmax, code, 64, dtype)
    same(blockwise.dequantize_blockwise(*arguments), reference8.dequantize_blockwise(*arguments))
