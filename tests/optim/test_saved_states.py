"""Optimizers that are saved, copied, pickled and loaded go on as if nothing had happened."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte import optim
from tests.support.optimizers import assert_equal, each, make, model, run

pytestmark = pytest.mark.filterwarnings("ignore:.*not paged.*")


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
