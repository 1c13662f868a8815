"""Settings of optimizers: overrides, other forms, and those that would be ignored are refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from halfbyte import optim
from halfbyte.errors import ArgumentError
from tests.support.optimizers import model, run


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
