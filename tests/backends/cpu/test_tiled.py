"""How a product on the matrix unit is cut into pieces."""

from __future__ import annotations

import pytest

from halfbyte.backends.cpu import tiled
from halfbyte.backends.cpu.kernels.tiles import SIDE

STEP = tiled.HIGH * SIDE


def pieces(batch: int, rows: int, threads: int, chunks: int = 24) -> list[int]:
    """Rows of each piece."""
    share = tiled._plan(batch, rows, chunks, threads).rows_a_piece
    return [min(share, rows - start) for start in range(0, rows, share)]


@pytest.mark.parametrize(("rows", "threads"), [(576, 2), (576, 3), (4096, 2), (4096, 7), (11008, 16)])
def test_many_activations_give_each_thread_as_many_rows(rows: int, threads: int) -> None:
    found = pieces(512, rows, threads)
    busiest = sum(sorted(found, reverse=True)[: -(-len(found) // threads)])
    assert busiest - rows / threads <= 2 * STEP


def test_pieces_are_small_while_the_second_level_cache_holds_the_activations() -> None:
    """128 activations of 4096 columns are a mebibyte."""
    assert set(pieces(128, 4096, 2, chunks=64)) == {STEP}
    assert set(pieces(128, 4096, 2, chunks=65)) == {tiled.GROUP_ROWS}


@pytest.mark.parametrize("rows", [1, 31, 576, 4096, 100_000])
@pytest.mark.parametrize("batch", [16, 17, 512])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_pieces_are_whole_steps_but_for_the_last(batch: int, rows: int, threads: int) -> None:
    *whole, _ = pieces(batch, rows, threads)
    assert all(piece % STEP == 0 for piece in whole)


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_every_thread_has_a_piece_of_few_activations_where_there_are_rows(threads: int) -> None:
    assert len(pieces(16, threads * STEP, threads)) == threads
