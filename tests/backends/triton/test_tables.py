"""The tables that kernels decode and encode with, against the codebooks they come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from halfbyte.backends.triton import device, slices
from halfbyte.formats.codebook import codebook, codebook_names


@pytest.mark.parametrize("name", codebook_names(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_pair_holds_the_rounded_levels_of_both_nibbles_the_even_one_low(name: str, dtype: torch.dtype) -> None:
    pairs = torch.from_numpy(device.rounded_pairs(name, dtype)).view(dtype).view(256, 2)
    levels = torch.from_numpy(codebook(name).table).to(dtype)
    byte = torch.arange(256)
    assert torch.equal(pairs, torch.stack([levels[byte >> 4], levels[byte & 15]], 1))


@pytest.mark.parametrize("name", codebook_names(4))
def test_words_hold_the_high_bytes_and_then_the_low_bytes(name: str) -> None:
    planes = np.array(device.words_of(name, torch.float16), "<i4").view(np.uint8).astype(np.uint16)
    bits = codebook(name).table.astype(np.float16).view(np.uint16)
    assert np.array_equal(planes[:16] << 8 | planes[16:], bits)


@pytest.mark.parametrize("name", codebook_names(4))
def test_every_cell_knows_its_midpoint_and_the_codes_around_it(name: str) -> None:
    book = codebook(name)
    cells = device.cells_of(book)
    origin = 64 if book.sign_bit is None else 0
    cuts = (cells.entries & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
    assert sorted(cuts[np.isfinite(cuts)].tolist()) == sorted(book.midpoints.tolist())
    for value in np.linspace(-1 if origin else 0, 1, 4001, dtype=np.float32):
        entry = int(np.rint(value * np.float32(cells.per_unit))) + origin
        codes = int(cells.entries[entry] >> 32)
        found = codes >> 4 & 15 if value > cuts[entry] else codes & 15
        assert found == book.rank_to_code[int((book.midpoints < value).sum())]


@pytest.mark.parametrize(("rows", "row_bytes", "step"), [(14336, 8192, 1), (28672, 16384, 8), (100000, 32768, 3)])
def test_slices_are_equal_whole_tiles_that_fit_the_bound(rows: int, row_bytes: int, step: int) -> None:
    count = slices.slice_rows(rows, row_bytes, step)
    assert count == rows or (count % slices.TILE == 0 and count % step == 0)
    assert count * row_bytes <= slices.SLICE_BYTES * 1.05
    pieces = -(-rows // count)
    assert pieces * count - rows < count / 2
