"""8-bit codes against bitsandbytes' two CPU implementations, which disagree with each other."""

import pytest
import torch

import halfbyte.functional as F
from tests.support.golden import DTYPES, golden
from tests.support.tolerances import TOLERANCES

CASES = [
    (name, blocksize, dtype)
    for name in ("dynamic", "unsigned")
    for blocksize in (64, 256, 1000, 4096)
    for dtype in DTYPES
]


def code_map(name: str) -> torch.Tensor:
    return golden("maps")["dynamic.signed" if name == "dynamic" else "dynamic.unsigned"]


@pytest.mark.parametrize(("name", "blocksize", "dtype"), CASES)
def test_codes_are_equal_to_plain_torch(name: str, blocksize: int, dtype: str) -> None:
    file, key = golden("blockwise"), f"{name}.{blocksize}.{dtype}"
    A = golden("inputs")["heavy"].to(DTYPES[dtype])
    codes, state = F.quantize_blockwise(A, code=code_map(name), blocksize=blocksize)
    assert torch.equal(codes, file[f"{key}.plain_codes"])
    assert torch.equal(state.absmax, file[f"{key}.absmax"])


@pytest.mark.parametrize(("name", "blocksize", "dtype"), CASES)
def test_their_cpu_library_is_never_nearer(name: str, blocksize: int, dtype: str) -> None:
    # It looks codes up in 65 536 equal bins: what is small beside absmax lands on a wrong code.
    file, key = golden("blockwise"), f"{name}.{blocksize}.{dtype}"
    A = golden("inputs")["heavy"].to(DTYPES[dtype])
    scaled = A.double() / file[f"{key}.absmax"].double().repeat_interleave(blocksize)[: A.numel()]
    levels = code_map(name).double()
    ours = F.quantize_blockwise(A, code=code_map(name), blocksize=blocksize)[0]
    theirs = file[f"{key}.native_codes"]
    error = {"ours": (levels[ours.long()] - scaled).abs(), "theirs": (levels[theirs.long()] - scaled).abs()}
    differ = ours != theirs
    assert differ.float().mean() > 0.01
    assert (error["ours"] - error["theirs"]).max() <= TOLERANCES["nearest slack"].relative


@pytest.mark.parametrize("blocksize", [64, 256, 1000, 4096])
@pytest.mark.parametrize("name", ["dynamic", "unsigned"])
def test_codes_dequantize_to_their_values(name: str, blocksize: int) -> None:
    file, key = golden("blockwise"), f"{name}.{blocksize}.fp32"
    values = F.dequantize_blockwise(
        file[f"{key}.plain_codes"], absmax=file[f"{key}.absmax"], code=code_map(name), blocksize=blocksize
    )
    assert torch.equal(values, file[f"{key}.values"])


def test_zero_stays_zero_which_their_cpu_library_breaks() -> None:
    # Theirs maps 0 beside 1 to 2.1e-5, so that 8-bit Adam moves weights whose gradient is zero.
    codes, state = F.quantize_blockwise(torch.tensor([0.0, 1.0, -0.0, 1e-9]), blocksize=256)
    assert F.dequantize_blockwise(codes, state).tolist() == [0.0, 1.0, 0.0, 0.0]
