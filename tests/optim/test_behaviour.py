"""What every optimizer of the family does beside its formula: gradients, closures, schedulers, layouts, refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte import optim
from halfbyte.errors import UnsupportedError
from tests.support.optimizers import FAMILY, assert_equal, backward, each, make, model, run

pytestmark = pytest.mark.filterwarnings("ignore:.*not paged.*")


@each
def test_states_have_the_bits_that_the_name_says(name: str) -> None:
    net = model()
    optimizer = make(name, net.parameters())
    run(net, optimizer, range(1))
    large, small = net[0].weight, net[0].bias
    assert optimizer.state[large]["state1"].dtype == (torch.uint8 if "8bit" in name else torch.float32)
    assert optimizer.state[small]["state1"].dtype == torch.float32


@each
def test_values_without_a_gradient_stay(name: str) -> None:
    p = torch.nn.Parameter(torch.randn(5000))
    before = p.detach().clone()
    optimizer = make(name, [p], weight_decay=0.0)
    for _ in range(5):
        g = torch.randn(5000)
        g[1::2] = 0.0
        p.grad = g
        optimizer.step()
    assert torch.equal(p[1::2], before[1::2])
    assert not torch.equal(p[::2], before[::2])


def with_one_bad_gradient(name: str, value: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Element 300 gets ``value`` in the third of four steps: parameters before and after that step, and at the end."""
    torch.manual_seed(7)
    p = torch.nn.Parameter(torch.randn(5000))
    optimizer = make(name, [p], weight_decay=0.1)
    seen: list[torch.Tensor] = []
    for step in range(4):
        p.grad = torch.randn(5000)
        if step == 2:
            p.grad[300] = value
        seen.append(p.detach().clone())
        optimizer.step()
    return seen[2], seen[3], p.detach()


@each
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_element_whose_gradient_is_not_finite_stays(name: str, value: float) -> None:
    before, after, end = with_one_bad_gradient(name, value)
    assert after[300] == before[300]
    assert end.isfinite().all()
    assert not torch.equal(after[301:], before[301:])


@pytest.mark.parametrize("name", [name for name in FAMILY if not name.startswith(("LARS", "LAMB"))])
def test_a_gradient_that_is_not_finite_does_not_reach_other_blocks(name: str) -> None:
    _, _, bad = with_one_bad_gradient(name, float("nan"))
    _, _, good = with_one_bad_gradient(name, 0.5)
    others = torch.ones(5000, dtype=torch.bool)
    others[256:512] = False
    assert torch.equal(bad[others], good[others])


@pytest.mark.parametrize("name", [name for name in FAMILY if not name.startswith(("LARS", "SGD"))])
def test_a_gradient_whose_square_overflows_stops_its_own_element_only(name: str) -> None:
    before, _, end = with_one_bad_gradient(name, 3e38)
    assert end.isfinite().all()
    assert not torch.equal(end[:256], before[:256])


@each
def test_closures_schedulers_groups_and_gradients_set_to_none(name: str) -> None:
    net = model()
    groups = [{"params": [net[0].weight], "lr": 5e-3}, {"params": [net[0].bias, net[2].weight]}]
    optimizer = make(name, groups)
    optimizer.add_param_group({"params": [net[2].bias]})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0 if epoch else 1.0)
    before = copy.deepcopy(net)

    def closure() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        return backward(net, 1)

    first = optimizer.step(closure)
    assert first is not None
    assert first.item() > 0
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 1e-2, 1e-2]
    moved = copy.deepcopy(net)
    if not name.startswith("ADOPT") and not name.startswith("PagedADOPT"):
        assert not torch.equal(net[0].weight, before[0].weight)
    schedule.step()
    optimizer.step(closure)
    assert_equal(net, moved)
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert_equal(net, moved)


def test_grad_scaler_skips_and_unscales() -> None:
    net, plain = model(), model()
    plain.load_state_dict(net.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, other = optim.AdamW8bit(net.parameters(), lr=1e-2), optim.AdamW8bit(plain.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 70, generator=generator)
    scaler.scale(net(x).square().mean()).backward()
    plain(x).square().mean().backward()
    scaler.step(optimizer)
    scaler.update()
    other.step()
    assert_equal(net, plain)
    net[0].weight.grad.fill_(float("inf"))
    scaler._per_optimizer_states.clear()
    scaler.scale(net(x).sum()).backward()
    scaler.step(optimizer)
    assert optimizer.state[net[0].weight]["step"] == 1


def test_clipping_all_gradients_at_once_works() -> None:
    net = model()
    optimizer = optim.AdamW8bit(net.parameters(), lr=1e-2)
    backward(net, 0)
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1, foreach=True)
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


@each
@pytest.mark.parametrize("shape", [(0,), (1,), (), (3, 0, 2)])
def test_parameters_of_no_and_of_one_element(name: str, shape: tuple[int, ...]) -> None:
    p = torch.nn.Parameter(torch.ones(shape))
    optimizer = make(name, [p], min_8bit_size=0)
    for _ in range(2):
        p.grad = torch.ones(shape)
        optimizer.step()
    assert p.isfinite().all()
    assert p.numel() == 0 or (p < 1).all()


@each
def test_a_layout_other_than_row_major_gives_the_same_values(name: str) -> None:
    value, gradient = torch.randn(64, 80), torch.randn(64, 80)
    plain, turned = torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.t().contiguous().t())
    for p in (plain, turned):
        optimizer = make(name, [p])
        for _ in range(3):
            p.grad = gradient.clone() if p is plain else gradient.t().contiguous().t()
            optimizer.step()
    assert turned.stride() == (1, 64)
    assert torch.equal(plain, turned)


@each
def test_sparse_and_complex_gradients_are_refused(name: str) -> None:
    table = torch.nn.Embedding(100, 64, sparse=True)
    optimizer = make(name, table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse"):
        optimizer.step()
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(UnsupportedError, match="complex"):
        make(name, [p]).step()


def test_the_reference_of_ademamix_is_what_the_others_compute() -> None:
    from halfbyte.optim.ademamix import _ReferenceAdEMAMix

    net = model()
    other = copy.deepcopy(net)
    schedule = {"t_alpha": 4, "t_beta3": 4, "betas": (0.9, 0.99, 0.999)}
    run(net, _ReferenceAdEMAMix(net.parameters(), lr=1e-3, **schedule), range(6))
    run(other, make("AdEMAMix32bit", other.parameters(), lr=1e-3, **schedule), range(6))
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
