"""Ways to change a 4-bit layer between two calls, so that it computes something else."""

from __future__ import annotations

import torch

from halfbyte.nn import Linear4bit
from tests.support.repeating import linear_4bit

__all__ = ["CHANGES", "replace_data", "replace_data_of_the_second_level", "replace_offset", "replace_weight"]


def replace_weight(layer: Linear4bit) -> None:
    layer.weight = linear_4bit(1).weight


def replace_data(layer: Linear4bit) -> None:
    layer.weight.data = linear_4bit(1).weight.data


def replace_state(layer: Linear4bit) -> None:
    layer.weight.quant_state = linear_4bit(1).weight.quant_state


def replace_absmax(layer: Linear4bit) -> None:
    state = layer.weight.quant_state
    state.absmax = torch.roll(state.absmax, 1)


def replace_offset(layer: Linear4bit) -> None:
    layer.weight.quant_state.offset = torch.tensor(1.5)


def replace_second_level(layer: Linear4bit) -> None:
    layer.weight.quant_state.state2.absmax = layer.weight.quant_state.state2.absmax * 2


def replace_data_of_the_second_level(layer: Linear4bit) -> None:
    second = layer.weight.quant_state.state2
    second.absmax.data = second.absmax.data * 2


def replace_data_of_the_codes_levels(layer: Linear4bit) -> None:
    second = layer.weight.quant_state.state2
    second.code.data = second.code.data * 2


def replace_data_of_the_offset(layer: Linear4bit) -> None:
    layer.weight.quant_state.offset.data = torch.tensor(1.5)


def replace_kind(layer: Linear4bit) -> None:
    layer.weight.quant_state.quant_type = "fp4"


def load(layer: Linear4bit) -> None:
    layer.load_state_dict(linear_4bit(1).state_dict())


def load_assigned(layer: Linear4bit) -> None:
    layer.load_state_dict(linear_4bit(1).state_dict(), assign=True)


CHANGES = [
    replace_weight, replace_data, replace_state, replace_absmax, replace_offset, replace_second_level,
    replace_data_of_the_second_level, replace_data_of_the_codes_levels, replace_data_of_the_offset, replace_kind,
    load, load_assigned,
]  # fmt: skip
