"""8-bit blocks that several processes share: each updates its values in fp32, then all agree on the scale.

The result is that of one process with the whole block: the rule works value by value, and the scale is the largest
magnitude of all parts. One all-reduce a step and group of processes carries the scales of every shared block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.optim import sharding
from halfbyte.optim.sharding import Part
from halfbyte.rules import encoding_map

__all__ = ["Edge", "Edges", "split"]

_ops = torch.ops.halfbyte


@dataclass
class Edge:
    """This process's values of one shared block: views into the flat local tensors."""

    param: Tensor
    grad: Tensor
    codes: list[Tensor]
    absmax: list[Tensor]
    slot: int


def split(part: Part, blocksize: int) -> tuple[tuple[int, int], list[tuple[int, int, int]]]:
    """Local run of values whose blocks are here alone, and the runs of shared blocks with their block's number.

    >>> split(Part((0, 300, 600, 900), 1), 256)
    ((212, 212), [(0, 212, 1), (212, 300, 2)])
    """
    shared = set(part.shared(blocksize))
    start, stop = part.start, part.stop
    low, high = start, stop
    edges: list[tuple[int, int, int]] = []
    if start < stop and start // blocksize in shared:
        low = min((start // blocksize + 1) * blocksize, stop)
        edges.append((0, low - start, start // blocksize))
    if low < stop and (stop - 1) // blocksize in shared:
        high = max((stop - 1) // blocksize * blocksize, low)
        edges.append((high - start, stop - start, (stop - 1) // blocksize))
    return (low - start, max(high, low) - start), edges


@dataclass
class Edges:
    """All shared blocks of one op call's parameters.

    Attributes:
        part: Any of the parameters' parts: names the processes.
        maps: Code map of each state.
        blocksize: Values per block.
        found: This process's edges.
        slots: Shared blocks of all parameters, here or not: each has its place in the all-reduce.
    """

    part: Part
    maps: list[Tensor]
    blocksize: int
    found: list[Edge] = field(default_factory=list[Edge])
    slots: int = 0

    def decode(self) -> list[Tensor]:
        """fp32 values of every state, ``(edges, blocksize)``; a row's first values are an edge's."""
        values: list[Tensor] = []
        for number, code in enumerate(self.maps):
            codes = torch.zeros(len(self.found), self.blocksize, dtype=torch.uint8, device=code.device)
            for row, edge in zip(codes, self.found, strict=True):
                row[: edge.param.numel()] = edge.codes[number]
            scales = torch.cat([edge.absmax[number] for edge in self.found])
            values.append(_ops.dequantize_blockwise(codes, scales, code, self.blocksize, torch.float32))
        return values

    def rows(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The states of each edge, those of the first edge first: views into ``values``."""
        return [value[row, : edge.param.numel()] for row, edge in enumerate(self.found) for value in values]

    def largest(self, values: Sequence[Tensor]) -> Tensor:
        """Scales of the parts that are here, ``(states, slots)``; 0 where nothing of a block is here."""
        device = self.maps[0].device
        found = torch.zeros(len(self.maps), self.slots, device=device)
        if self.found:
            lengths = torch.tensor([edge.param.numel() for edge in self.found], device=device)
            inside = torch.arange(self.blocksize, device=device) < lengths[:, None]
            places = torch.tensor([edge.slot for edge in self.found], device=device)
            for number, value in enumerate(values):
                value.mul_(inside)
                found[number, places] = value.abs().amax(dim=1)
        return found

    def encode(self, values: Sequence[Tensor], scales: Tensor) -> None:
        """Store the states as codes under the agreed ``scales`` (states, slots)."""
        if not self.found:
            return
        places = torch.tensor([edge.slot for edge in self.found], device=scales.device)
        for number, (code, value) in enumerate(zip(self.maps, values, strict=True)):
            # A shared block is never whole here: its last place is free, and carries the scale into the op.
            value[:, -1] = scales[number, places]
            codes, absmax = _ops.quantize_blockwise(value, encoding_map(code), self.blocksize)
            for row, edge in enumerate(self.found):
                edge.codes[number].copy_(codes[row, : edge.param.numel()])
                edge.absmax[number].copy_(absmax[row : row + 1])


def agree(batches: Sequence[tuple[Edges, Tensor]]) -> None:
    """Replace the scales of each batch by the largest over all processes, with one all-reduce."""
    flat = torch.cat([scales.reshape(-1) for _, scales in batches])
    sharding.agreed(flat, batches[0][0].part)
    start = 0
    for _, scales in batches:
        scales.copy_(flat[start : start + scales.numel()].view(scales.shape))
        start += scales.numel()
