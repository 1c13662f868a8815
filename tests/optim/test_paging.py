"""How paged states are cut into pieces; that they step alike, tests/gpu shows."""

from __future__ import annotations

import pytest
import torch

from halfbyte.optim.paging import loads, pageable


@pytest.mark.parametrize("blocksize", [256, 2048, 0])
@pytest.mark.parametrize("sizes", [(10_000,), (1, 2, 3), (4096, 4096), (8191, 1, 9000), (2048 * 5,)])
def test_pieces_hold_every_value_once_and_never_cut_a_block(sizes: tuple[int, ...], blocksize: int) -> None:
    size = 4096
    params = [torch.arange(n) + 100_000 * i for i, n in enumerate(sizes)]
    states = [p + k for p in params for k in (1, 2)]
    absmax = [torch.arange(-(-n // blocksize)) for n in sizes for _ in range(2)] if blocksize else []
    found: list[torch.Tensor] = []
    for pieces in loads(params, [p * 3 for p in params], states, absmax, blocksize, size):
        assert sum(piece.param.numel() for piece in pieces) <= size
        for piece in pieces:
            found.append(piece.param)
            assert torch.equal(piece.grad, piece.param * 3)
            assert [torch.equal(s, piece.param + k) for k, s in enumerate(piece.states, 1)] == [True, True]
            if blocksize:
                first = int(piece.param[0]) % 100_000
                assert first % blocksize == 0
                blocks = list(range(first // blocksize, -(-(first + piece.param.numel()) // blocksize)))
                assert [scale.tolist() for scale in piece.absmax] == [blocks, blocks]
    assert torch.equal(torch.cat(found), torch.cat(params))


def test_a_cpu_parameter_is_not_paged() -> None:
    assert not pageable(torch.zeros(1 << 20))
