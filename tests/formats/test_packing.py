"""The k-bit stream: round trips for every width, bit order, numpy and torch alike."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import ArgumentError
from halfbyte.formats import block_count, blocks, pack, packed_bytes, unpack


@given(bits=st.integers(1, 7), data=st.data())
def test_unpacking_undoes_packing(bits: int, data: st.DataObject) -> None:
    codes = data.draw(
        st.lists(st.integers(0, 2**bits - 1), min_size=8, max_size=8 * 5).filter(lambda c: len(c) % 8 == 0)
    )
    grid = np.array(codes, np.int64).reshape(-1, 8)
    stream = np.stack(pack(grid, bits), axis=1)
    assert stream.shape == (len(grid), bits)
    assert stream.max(initial=0) < 256
    np.testing.assert_array_equal(np.stack(unpack(stream, bits), axis=1), grid)


@given(bits=st.integers(1, 7), codes=st.lists(st.integers(0, 127), min_size=8, max_size=8))
def test_the_stream_is_most_significant_bit_first(bits: int, codes: list[int]) -> None:
    codes = [code % 2**bits for code in codes]
    text = "".join(format(code, f"0{bits}b") for code in codes)
    expected = [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
    assert [int(byte[0]) for byte in pack(np.array([codes], np.int64), bits)] == expected


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_torch_and_numpy_give_the_same_stream(bits: int) -> None:
    grid = np.random.default_rng(0).integers(0, 2**bits, (9, 8))
    left = np.stack(pack(grid, bits), axis=1)
    right = torch.stack(pack(torch.from_numpy(grid), bits), dim=1)
    np.testing.assert_array_equal(left, right.numpy())


def test_counts_need_no_tensor_and_know_no_limit() -> None:
    many = 5 * 2**31 + 1
    assert packed_bytes(many) == 5 * 2**30 + 1
    assert block_count(many, 64) == 5 * 2**25 + 1
    assert blocks.packed_rows(many - 1, 4) == 5 * 2**28


def test_bytes_that_do_not_fill_the_storage_are_refused() -> None:
    with pytest.raises(ArgumentError, match="65 values take 33 bytes"):
        blocks.packed_rows(65, 2)


@pytest.mark.parametrize("blocksize", [0, 16, 48, 63, 8192, -64])
def test_other_4bit_blocksizes_are_refused(blocksize: int) -> None:
    with pytest.raises(ArgumentError, match=f"blocksize is {blocksize}; expected one of 32, 64"):
        blocks.check_blocksize_4bit(blocksize)
