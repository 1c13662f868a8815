"""Squares above zero never become zero in 8 bits, zeros stay zeros, and means may become zero: on every CPU backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import halfbyte.functional as F
from halfbyte.optim.edges import Edge, Edges
from halfbyte.optim.sharding import Part
from halfbyte.rules import encoding_map, hyper, rule_named, rule_names

ops = torch.ops.halfbyte
BLOCKSIZE = 256
MAPS = {True: F.create_dynamic_map(), False: F.create_dynamic_map(signed=False)}
WITH_SQUARES = [name for name in rule_names() if not all(rule_named(name).signed)]


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, only_backend: Callable[[str], None]) -> str:
    only_backend(request.param)
    return request.param


def stepped(rule: str, g: torch.Tensor, steps: int = 1) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Codes and scales of each state."""
    signed = rule_named(rule).signed
    codes = [torch.full(g.shape, int((MAPS[one] == 0).nonzero()), dtype=torch.uint8) for one in signed]
    absmax = [torch.zeros(-(-g.numel() // BLOCKSIZE)) for _ in signed]
    p, maps = torch.zeros_like(g), [MAPS[one] for one in signed]
    for t in range(1, steps + 1):
        h = torch.tensor(hyper(lr=1e-3, beta1=0.9, beta2=0.99, beta3=0.999, alpha=2.0, eps=1e-8, step=t))
        ops.optimizer_step_8bit([p], [g], codes, absmax, maps, h, BLOCKSIZE, rule)
    return codes, absmax


def far_apart(largest: float) -> torch.Tensor:
    """Gradients from ``largest`` down to 1e-10 of it, and zeros."""
    g = torch.logspace(0, -10, 600) * largest
    g[::7] = 0.0
    return g


def test_rules_with_squares_are_these() -> None:
    assert WITH_SQUARES == ["adam", "ademamix", "adopt"]


@pytest.mark.parametrize("largest", [1e3, 1.0, 1e-6])
@pytest.mark.parametrize("rule", WITH_SQUARES)
def test_a_square_above_zero_never_becomes_zero(rule: str, largest: float, backend: str) -> None:
    g = far_apart(largest)
    codes, _ = stepped(rule, g, steps=3)
    assert torch.equal(codes[-1] == 0, g == 0)


def test_it_is_the_smallest_code_where_zero_would_be_nearest(backend: str) -> None:
    g = torch.tensor([1.0, 1e-3, 5e-4, 3e-4, 1e-9, 0.0])  # squares: 1e-6 is nearest to code 2, the rest below 3.25e-7
    codes, _ = stepped("adam", g)
    assert codes[-1].tolist() == [255, 2, 1, 1, 1, 0]


def test_blocks_of_zeros_and_of_the_smallest_squares(backend: str) -> None:
    g = torch.zeros(3 * BLOCKSIZE)
    g[BLOCKSIZE : BLOCKSIZE + 4] = torch.tensor([1e-18, 1e-19, 1e-20, 0.0])  # the largest square is normal in fp32
    g[2 * BLOCKSIZE : 2 * BLOCKSIZE + 3] = torch.tensor([1e-20, 1e-21, 0.0])  # all are subnormal
    codes, absmax = stepped("adam", g)
    assert absmax[-1][0] == 0
    assert not codes[-1][:BLOCKSIZE].any()
    assert (codes[-1][BLOCKSIZE : BLOCKSIZE + 4] > 0).tolist() == [True, True, True, False]
    assert (codes[-1][2 * BLOCKSIZE : 2 * BLOCKSIZE + 3] > 0).tolist() == [True, True, False]
    assert codes[-1][BLOCKSIZE] == codes[-1][2 * BLOCKSIZE] == 255


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_leaves_its_neighbours_alone(bad: float, backend: str) -> None:
    g = far_apart(1.0)
    broken = g.clone()
    broken[300] = bad
    (_, squares), (_, scales) = stepped("adam", broken)
    g[300] = 0.0
    (_, expected), (_, expected_scales) = stepped("adam", g)
    assert torch.equal(squares, expected)
    assert torch.equal(scales, expected_scales)


def test_means_near_zero_become_zero(backend: str) -> None:
    (means,), _ = stepped("lion", torch.tensor([1.0, 1e-8, -1e-8, 0.0]))
    zero = int((MAPS[True] == 0).nonzero())
    assert means.tolist() == [255, zero, zero, zero]


def test_a_block_that_processes_share_follows_the_same_rule(backend: str) -> None:
    squares = torch.tensor([[1.0, 1e-12, 0.0, 0.25] + [0.0] * (BLOCKSIZE - 4)])
    edge = Edge(torch.zeros(4), torch.zeros(4), [torch.zeros(4, dtype=torch.uint8)], [torch.zeros(1)], 0)
    edges = Edges(Part((0, 4, 300), 0), [MAPS[False]], BLOCKSIZE, [edge], 1)
    edges.encode([squares], torch.tensor([[2.0]]))
    assert edge.absmax[0].tolist() == [2.0]
    assert edge.codes[0].tolist()[1:3] == [1, 0]


def test_midpoints_of_all_other_codes_stay() -> None:
    code = MAPS[False]
    apart = encoding_map(code)
    assert torch.equal(apart[1:], code[1:])
    assert (apart[0] + apart[1]) / 2 == 0
    assert torch.equal(encoding_map(MAPS[True]), MAPS[True])
