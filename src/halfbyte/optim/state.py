"""What an optimizer keeps for a parameter: fp32 tensors, or 8-bit codes with a map and an absmax per block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.formats import blocks
from halfbyte.optim import sharding
from halfbyte.rules import Rule

__all__ = [
    "BLOCKSIZE",
    "NON_CASTABLE",
    "WRAPPER",
    "Slot",
    "absmax_of",
    "blocksize_here",
    "blocksize_of",
    "check_loaded",
    "fill",
    "is_8bit",
    "maps_of",
    "slots",
    "states_of",
]

BLOCKSIZE = 256
"""Values that share an absmax; old state dicts have :data:`OLD_BLOCKSIZE`."""

OLD_BLOCKSIZE = 2048
"""bitsandbytes up to 0.43."""

WRAPPER = "__bnb_optimizer_quant_state__"
"""Key under which a state dict holds the tensors whose shape is not the parameter's, out of reach of FSDP1's gather."""

NON_CASTABLE = frozenset(
    {
        *("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2", "unorm_vec", "gnorm_vec"),
        *("max1", "max2", "new_max1", "new_max2"),
    }
)
"""Entries that keep their dtype when a state dict is loaded, and that are wrapped when one is made."""


@dataclass(frozen=True)
class Slot:
    """Where one state of a rule lives: in ``state<number>``, whole or as one of two stacked parts."""

    number: int
    part: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """This slot's part of ``state<number>`` or ``absmax<number>``."""
        return tensor if self.part is None else tensor[self.part]


def slots(rule: Rule) -> tuple[Slot, ...]:
    """Slots of the rule's states, in order, as bitsandbytes lays them out.

    >>> from halfbyte.rules import rule_named
    >>> [(slot.number, slot.part) for slot in slots(rule_named("ademamix"))]
    [(1, 0), (1, 1), (2, None)]
    """
    count = len(rule.signed)
    if count == 3:
        return Slot(1, 0), Slot(1, 1), Slot(2)
    return tuple(Slot(number) for number in range(1, count + 1))


def fill(
    state: dict[str, Any],
    p: Tensor,
    rule: Rule,
    bits: int,
    buffer: Callable[[Tensor, torch.dtype, int], Tensor],
    qmap: Callable[[bool, torch.device], Tensor],
) -> None:
    """Put zero states for ``p`` into ``state``.

    Args:
        state: Gets ``state1``, ... and for 8 bits ``qmap1``, ``absmax1``, ...
        p: The parameter.
        rule: Says how many states there are and which can be negative.
        bits: 8 or 32.
        buffer: Returns zeros for (parameter, dtype, number of stacked parts; 0 for none).
        qmap: Returns the code map for (signed, device).
    """
    for slot, signed in zip(slots(rule), rule.signed, strict=True):
        key, parts = slot.number, 0 if slot.part is None else 2
        if slot.part:
            continue
        state[f"state{key}"] = buffer(p, torch.uint8 if bits == 8 else torch.float32, parts)
        if bits == 8:
            count = sharding.local_blocks(p, BLOCKSIZE)
            shape = (parts, count) if parts else (count,)
            state[f"qmap{key}"] = qmap(signed, p.device)
            state[f"absmax{key}"] = torch.zeros(shape, dtype=torch.float32, device=p.device)


def is_8bit(state: Mapping[str, Any]) -> bool:
    """Whether its states are 8-bit codes."""
    return state["state1"].dtype == torch.uint8


def states_of(state: Mapping[str, Any], rule: Rule) -> list[Tensor]:
    """The rule's states, local where the parameter is sharded: codes or fp32."""
    return [slot.of(sharding.local(state[f"state{slot.number}"])) for slot in slots(rule)]


def absmax_of(state: Mapping[str, Any], rule: Rule) -> list[Tensor]:
    """Scales of the 8-bit states, fp32 ``(blocks,)`` each."""
    return [slot.of(state[f"absmax{slot.number}"]) for slot in slots(rule)]


def maps_of(state: Mapping[str, Any], rule: Rule) -> list[Tensor]:
    """Code maps of the 8-bit states."""
    return [state[f"qmap{slot.number}"] for slot in slots(rule)]


def blocksize_of(numel: int, count: int) -> int:
    """Values per block, from the number of values and of blocks.

    Raises:
        CheckpointError: Neither 256 nor 2048 fits.

    >>> blocksize_of(5000, 20), blocksize_of(5000, 3)
    (256, 2048)
    """
    for blocksize in (BLOCKSIZE, OLD_BLOCKSIZE):
        if blocks.block_count(numel, blocksize) == count:
            return blocksize
    raise CheckpointError(
        f"an optimizer state of {numel} values has {count} absmax values",
        expected=f"one for each {BLOCKSIZE} or each {OLD_BLOCKSIZE}",
    )


def blocksize_here(p: Tensor, absmax: Tensor) -> int:
    """Values per block of a state of which this process holds these scales."""
    if sharding.local_blocks(p, BLOCKSIZE) == absmax.shape[-1]:
        return BLOCKSIZE
    return OLD_BLOCKSIZE


def check_loaded(state: Mapping[str, Any], p: Tensor, rule: Rule) -> None:
    """Refuse a loaded state that is not one of this parameter under this rule.

    Raises:
        CheckpointError: It is not, or it was made without blocks.
    """
    if "max1" in state or "new_max1" in state:
        raise CheckpointError(
            "an optimizer state without blocks (bitsandbytes up to 0.43 with block_wise=False)",
            expected="blockwise states",
            hint="load the model without its optimizer state: the states build up again within some hundred steps",
        )
    for slot in slots(rule):
        key = f"state{slot.number}"
        if key not in state:
            raise CheckpointError(
                f"the optimizer state of a parameter lacks {key!r}",
                expected=f"the states of {rule.name!r}",
                hint="it was saved by another optimizer: load it into that class",
            )
        parts = 1 if slot.part is None else 2
        if state[key].numel() != parts * p.numel():
            raise CheckpointError(
                f"{key} has {state[key].numel()} values for a parameter of shape {tuple(p.shape)}",
                expected=f"{parts * p.numel()}",
            )
        if state[key].dtype == torch.uint8:
            missing = {f"qmap{slot.number}", f"absmax{slot.number}"} - state.keys()
            if missing:
                raise CheckpointError(f"an 8-bit optimizer state lacks {', '.join(sorted(missing))}")
            blocksize_of(p.numel(), state[f"absmax{slot.number}"].shape[-1])
