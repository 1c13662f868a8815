"""What every optimizer of the family does beside its formula: settings, closures, schedulers, copies, refusals."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte import optim
from halfbyte.errors import ArgumentError, UnsupportedError

FAMILY = {
    name: getattr(optim, name)
    for name in optim.__all__
    if isinstance(getattr(optim, name), type)
    and issubclass(getattr(optim, name), optim.Optimizer8bit)
    and not name.startswith("Optimizer")
}
each = pytest.mark.parametrize("name", FAMILY)
pytestmark = pytest.mark.filterwarnings("ignore:.*not paged.*")


@pytest.fixture(autouse=True)
def fresh_manager() -> Iterator[None]:
    yield
    optim.GlobalOptimManager.get_instance().initialize()


def settings(name: str) -> dict[str, Any]:
    return {"lr": 1e-2, "momentum": 0.9} if name.startswith(("SGD", "LARS")) else {"lr": 1e-2}


def make(name: str, params: Any, **more: Any) -> optim.Optimizer8bit:
    return FAMILY[name](params, **{**settings(name), **more})


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(70, 60), torch.nn.GELU(), torch.nn.Linear(60, 80))


def backward(net: torch.nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    loss = (net(torch.randn(16, 70, generator=generator)) - torch.randn(16, 80, generator=generator)).square().mean()
    loss.backward()
    return loss


def run(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for seed in steps:
        optimizer.zero_grad()
        backward(net, seed)
        optimizer.step()


def assert_equal(left: torch.nn.Module, right: torch.nn.Module) -> None:
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b)


@each
def test_states_have_the_bits_that_the_name_says(name: str) -> None:
    net = model()
    optimizer = make(name, net.parameters())
    run(net, optimizer, range(1))
    large, small = net[0].weight, net[0].bias
    assert optimizer.state[large]["state1"].dtype == (torch.uint8 if "8bit" in name else torch.float32)
    assert optimizer.state[small]["state1"].dtype == torch.float32


@each
def test_a_saved_state_goes_on_as_if_nothing_had_happened(name: str) -> None:
    net = model()
    optimizer = make(name, net.parameters())
    run(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, copied = model(), copy.deepcopy(net)
    again.load_state_dict(copied.state_dict())
    other = make(name, again.parameters())
    other.load_state_dict(torch.load(file))
    run(net, optimizer, range(3, 6))
    run(again, other, range(3, 6))
    assert_equal(net, again)


@each
def test_a_deep_copy_and_a_pickle_go_on_by_themselves(name: str) -> None:
    net = model()
    optimizer = make(name, net.parameters())
    run(net, optimizer, range(2))
    net2, optimizer2 = copy.deepcopy((net, optimizer))
    net3, optimizer3 = pickle.loads(pickle.dumps((net, optimizer)))
    for n, o in ((net, optimizer), (net2, optimizer2), (net3, optimizer3)):
        run(n, o, range(2, 4))
    assert_equal(net, net2)
    assert_equal(net, net3)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "Lion8bit", "LAMB8bit"])
def test_a_state_dict_can_be_written_as_safetensors(name: str, tmp_path: Path) -> None:
    net = model()
    optimizer = make(name, net.parameters())
    run(net, optimizer, range(2))
    whole = optimizer.state_dict()
    wrapper = "__bnb_optimizer_quant_state__"
    flat = {f"{i}.{key}": v for i, entry in whole["state"].items() for key, v in entry[wrapper].items()}
    save_file(flat, tmp_path / "state.safetensors")
    read = load_file(tmp_path / "state.safetensors")
    state = {
        i: {"step": entry["step"], **{key: read[f"{i}.{key}"] for key in entry[wrapper]}}
        for i, entry in whole["state"].items()
    }
    net2 = copy.deepcopy(net)
    other = make(name, net2.parameters())
    other.load_state_dict({**whole, "state": state})
    run(net, optimizer, range(2, 4))
    run(net2, other, range(2, 4))
    assert_equal(net, net2)


def test_loading_leaves_the_dictionary_alone_and_shares_nothing_with_it() -> None:
    net = model()
    optimizer = make("Adam8bit", net.parameters())
    run(net, optimizer, range(1))
    given = optimizer.state_dict()
    kept = copy.deepcopy(given)
    optimizer.load_state_dict(given)
    run(net, optimizer, range(1, 3))
    wrapper = "__bnb_optimizer_quant_state__"
    for index, entries in given["state"].items():
        assert entries["step"] == 1
        for key, value in entries[wrapper].items():
            assert torch.equal(value, kept["state"][index][wrapper][key]), key


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


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_parameters_of_16_bits_keep_32_bit_states_in_32_bits_through_a_file(kind: torch.dtype) -> None:
    net = model().to(kind)
    optimizer = optim.AdamW32bit(net.parameters(), lr=1e-2)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    other = optim.AdamW32bit(net.parameters(), lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    for p in net.parameters():
        assert other.state[p]["state1"].dtype == torch.float32
        assert torch.equal(other.state[p]["state1"], optimizer.state[p]["state1"])


def test_overrides_hold_for_single_parameters_and_modules() -> None:
    net, manager = model(), optim.GlobalOptimManager.get_instance()
    manager.register_parameters(net.parameters())
    manager.override_config(net[0].weight, "optim_bits", 32)
    manager.register_module_override(net[2], "weight", {"optim_bits": 32, "lr": 0.0})
    optimizer = optim.Adam(net.parameters(), lr=1e-2, optim_bits=8, weight_decay=0.0, min_8bit_size=1)
    before = copy.deepcopy(net)
    run(net, optimizer, range(1))
    assert optimizer.state[net[0].weight]["state1"].dtype == torch.float32
    assert optimizer.state[net[2].weight]["state1"].dtype == torch.float32
    assert optimizer.state[net[2].bias]["state1"].dtype == torch.uint8
    assert torch.equal(net[2].weight, before[2].weight)
    assert not torch.equal(net[0].weight, before[0].weight)


def test_a_paged_optimizer_says_once_that_a_cpu_has_nothing_to_page() -> None:
    net = model()
    optimizer = optim.PagedAdamW8bit(net.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(net, optimizer, range(2))
    assert [str(one.message) for one in caught if "not paged" in str(one.message)] == [
        "PagedAdamW8bit: states are in ordinary memory of 'cpu', not paged. "
        "On the CPU there is nothing to page: states are in host memory already"
    ]


GUARDS: dict[str, tuple[Callable[[list[Any]], Any], type[Exception], str]] = {
    "amsgrad in 8 bits": (lambda p: optim.Adam8bit(p, amsgrad=True), ValueError, "amsgrad"),
    "amsgrad in 32 bits": (lambda p: optim.AdamW(p, amsgrad=True), ValueError, "amsgrad"),
    "bits of Adam8bit": (lambda p: optim.Adam8bit(p, optim_bits=8), ValueError, "optim_bits"),
    "bits of PagedAdamW8bit": (lambda p: optim.PagedAdamW8bit(p, optim_bits=16), ValueError, "optim_bits"),
    "bits of Adagrad8bit": (lambda p: optim.Adagrad8bit(p, optim_bits=32), ValueError, "optim_bits"),
    "no momentum": (lambda p: optim.SGD8bit(p, 0.1), NotImplementedError, "momentum"),
    "no momentum in LARS": (lambda p: optim.LARS(p, 0.1), NotImplementedError, "momentum"),
    "nesterov with dampening": (lambda p: optim.SGD(p, 0.1, 0.9, 0.5, nesterov=True), ValueError, "dampening"),
    "RMSprop alpha": (lambda p: optim.RMSprop(p, alpha=0), NotImplementedError, "alpha"),
    "RMSprop centered": (lambda p: optim.RMSprop8bit(p, centered=True), NotImplementedError, "Centered"),
    "RMSprop momentum": (lambda p: optim.RMSprop(p, momentum=0.5), ValueError, "momentum"),
    "Adagrad lr_decay": (lambda p: optim.Adagrad(p, lr_decay=0.1), ValueError, "lr_decay"),
    "Adagrad start": (lambda p: optim.Adagrad(p, initial_accumulator_value=1), ValueError, "initial_accumulator_value"),
    "LAMB amsgrad": (lambda p: optim.LAMB8bit(p, amsgrad=True), ValueError, "amsgrad"),
    "LAMB mode": (lambda p: optim.LAMB(p, adam_w_mode=False), ValueError, "adam_w_mode"),
    "lr": (lambda p: optim.AdamW8bit(p, lr=-1), ValueError, "Invalid learning rate: -1"),
    "beta": (lambda p: optim.Lion8bit(p, betas=(0.9, 1.0)), ValueError, "Invalid beta parameter at index 1: 1.0"),
    "eps": (lambda p: optim.Adam(p, eps=-1), ValueError, "Invalid epsilon value: -1"),
    "decay": (lambda p: optim.Lion(p, weight_decay=-1), ValueError, "Invalid weight_decay value: -1"),
    "block_wise": (lambda p: optim.Adam8bit(p, block_wise=False), ValueError, "block_wise=False"),
    "percentile": (lambda p: optim.Adam8bit(p, percentile_clipping=0), ValueError, "percentile_clipping is 0"),
    "unknown": (lambda p: optim.Adam8bit(p, nestrov=True), ValueError, "'nestrov'"),
    "rule": (lambda p: optim.Optimizer2State("adamw2", p), ValueError, "'adamw2' is unknown"),
    "bits": (lambda p: _stepped(optim.Adam(p, optim_bits=4)), NotImplementedError, "4"),
}


def _stepped(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("case", GUARDS)
def test_what_would_be_ignored_is_refused(case: str) -> None:
    build, kind, text = GUARDS[case]
    with pytest.raises(kind, match=text.replace("(", r"\(")):
        build([torch.nn.Parameter(torch.zeros(5000))])


def test_betas_may_be_text() -> None:
    optimizer = optim.Adam8bit([torch.nn.Parameter(torch.zeros(3))], betas="(0.8, 0.95)")
    assert optimizer.param_groups[0]["betas"] == [0.8, 0.95]


def test_settings_may_come_as_an_object() -> None:
    args = optim.MockArgs({"optim_bits": 8, "min_8bit_size": 16, "max_unorm": 0.0, "skip_zeros": True})
    p = torch.nn.Parameter(torch.ones(100))
    optimizer = optim.Adam([p], lr=0.1, args=args, weight_decay=0.1)
    p.grad = torch.zeros(100)
    p.grad[:50] = 1.0
    optimizer.step()
    assert optimizer.state[p]["state1"].dtype == torch.uint8
    assert (p[50:] == 1).all()
    assert (p[:50] < 1).all()


def test_an_unknown_argument_error_names_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match="block_wise, capturable, percentile_clipping, stochastic_rounding"):
        optim.Lion([torch.nn.Parameter(torch.zeros(3))], foreach=True)


def test_capturable_steps_are_counted_together_and_apart_after_a_load() -> None:
    net = model()
    optimizer = make("AdamW8bit", net.parameters(), capturable=True)
    run(net, optimizer, range(3))
    assert len({id(entry["step"]) for entry in optimizer.state.values()}) == 1
    assert {float(entry["step"]) for entry in optimizer.state.values()} == {3.0}
    other = make("AdamW8bit", net.parameters(), capturable=True)
    other.load_state_dict(optimizer.state_dict())
    assert len({id(entry["step"]) for entry in other.state.values()}) == 1
    run(net, other, range(1))
    assert float(other.state[net[0].weight]["step"]) == 4.0
    assert float(optimizer.state[net[0].weight]["step"]) == 3.0


def test_the_reference_of_ademamix_is_what_the_others_compute() -> None:
    from halfbyte.optim.ademamix import _ReferenceAdEMAMix

    net = model()
    other = copy.deepcopy(net)
    schedule = {"t_alpha": 4, "t_beta3": 4, "betas": (0.9, 0.99, 0.999)}
    run(net, _ReferenceAdEMAMix(net.parameters(), lr=1e-3, **schedule), range(6))
    run(other, make("AdEMAMix32bit", other.parameters(), lr=1e-3, **schedule), range(6))
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
