"""More than 2^31 elements: shapes, counts and offsets are 64-bit; no test here allocates such a tensor."""

from collections.abc import Callable

import pytest
import torch

import halfbyte.functional as F
from halfbyte.backends.reference import coding
from halfbyte.formats import BLOCKSIZES_4BIT
from tests.support.hard_inputs import weights

ops = torch.ops.halfbyte
MANY = 3 * 2**31 + 77


def test_quantized_shapes_of_a_huge_tensor() -> None:
    packed, absmax = ops.quantize_4bit(torch.empty(MANY, device="meta"), 64, "nf4", torch.uint8)
    assert packed.shape == ((MANY + 1) // 2, 1)
    assert absmax.shape == (-(-MANY // 64),)
    codes, scales = ops.quantize_blockwise(torch.empty(MANY, device="meta"), torch.empty(256, device="meta"), 256)
    assert codes.shape == (MANY,)
    assert scales.shape == (-(-MANY // 256),)


def test_dequantized_shapes_of_a_huge_tensor() -> None:
    rows, columns = 2**16, 2**17
    packed = torch.empty(rows * columns // 2, 1, dtype=torch.uint8, device="meta")
    absmax = torch.empty(rows * columns // 64, device="meta")
    values = ops.dequantize_4bit(packed, absmax, 64, "nf4", [rows, columns], torch.bfloat16)
    assert values.numel() == 2**33
    y = ops.gemm_4bit(torch.empty(2, columns, device="meta"), packed, [rows, columns], absmax, 64, "nf4")
    assert y.shape == (2, rows)


@pytest.mark.parametrize("blocksize", [*BLOCKSIZES_4BIT, 1, 100, 10**7])
def test_pieces_cover_a_huge_tensor_in_whole_blocks(blocksize: int) -> None:
    position = 0
    for start, stop in coding.pieces(MANY, blocksize):
        assert start == position
        assert start % blocksize == 0
        assert 0 < stop - start <= max(coding.CHUNK, blocksize)
        position = stop
    assert position == MANY


@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_seams_between_pieces_do_not_show(
    monkeypatch: pytest.MonkeyPatch, only_backend: Callable[[str], None], kind: str, blocksize: int
) -> None:
    only_backend("reference")
    A = weights(5 * 512 + 97)
    whole = F.quantize_4bit(A, blocksize=blocksize, quant_type=kind)
    values = F.dequantize_4bit(*whole)
    monkeypatch.setattr(coding, "CHUNK", 512)
    pieces = F.quantize_4bit(A, blocksize=blocksize, quant_type=kind)
    assert torch.equal(pieces[0], whole[0])
    assert torch.equal(pieces[1].absmax, whole[1].absmax)
    assert torch.equal(F.dequantize_4bit(*pieces), values)


def test_the_seams_between_8bit_pieces_do_not_show(
    monkeypatch: pytest.MonkeyPatch, only_backend: Callable[[str], None]
) -> None:
    only_backend("reference")
    A = weights(5 * 512 + 97)
    whole = F.quantize_blockwise(A, blocksize=100)
    values = F.dequantize_blockwise(*whole)
    monkeypatch.setattr(coding, "CHUNK", 512)
    pieces = F.quantize_blockwise(A, blocksize=100)
    assert torch.equal(pieces[0], whole[0])
    assert torch.equal(F.dequantize_blockwise(*pieces), values)
