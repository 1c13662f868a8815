"""Parameters that one op call steps together, and the calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halfbyte.backends import registry
from halfbyte.ops.optimizer import NEAREST
from halfbyte.optim.edges import Edge, Edges, agree, split
from halfbyte.optim.paging import Pager
from halfbyte.optim.sharding import Part
from halfbyte.rules import Rule

__all__ = ["Bucket", "run"]

_ops = torch.ops.halfbyte


@dataclass(eq=False)
class Bucket:
    """Same rule and settings, same kind of state, same device.

    Attributes:
        rule: The algorithm.
        settings: Numbers of the step, as :func:`halfbyte.rules.hyper` takes them.
        skip_zeros: Leave values alone whose gradient is exactly zero.
        seed: See :data:`halfbyte.ops.optimizer.NEAREST`.
        blocksize: Values per block of 8-bit states; 0 for fp32 ones.
        maps: Code map of each 8-bit state.
        device: Of the parameters.
        pager: Where the states are in host memory.
        paged: Those states, for the pager to hold.
        prepared: Repeats the call with other numbers.
        edges: Blocks that are shared with other processes.
    """

    rule: Rule
    settings: dict[str, Any]
    skip_zeros: bool
    blocksize: int
    maps: list[Tensor]
    device: torch.device
    pager: Pager | None = None
    paged: list[Tensor] = field(default_factory=list[Tensor])
    seed: int = NEAREST
    params: list[Tensor] = field(default_factory=list[Tensor])
    grads: list[Tensor] = field(default_factory=list[Tensor])
    states: list[Tensor] = field(default_factory=list[Tensor])
    absmax: list[Tensor] = field(default_factory=list[Tensor])
    edges: Edges | None = None
    prepared: Callable[[Tensor, int], None] | None = None

    @property
    def repeats(self) -> bool:
        """Whether another step may use this bucket, with other numbers."""
        return self.edges is None and not {"grad_scale", "update_scale"} & self.settings.keys()

    def add(self, part: Part, param: Tensor, grad: Tensor, states: list[Tensor], absmax: list[Tensor]) -> None:
        """Take in what this process holds of a parameter; ``absmax`` is empty for fp32 states.

        Args:
            part: Which values that is.
            param: The local parameter.
            grad: Its gradient.
            states: Its states.
            absmax: Their scales.
        """
        shared = part.shared(self.blocksize) if self.blocksize and part.group is not None else []
        if shared:
            self._add_cut(part, shared, param, grad, states, absmax)
        elif param.numel():
            self.params.append(param)
            self.grads.append(grad)
            self.states += states
            self.absmax += absmax

    def _add_cut(
        self, part: Part, shared: list[int], param: Tensor, grad: Tensor, states: list[Tensor], absmax: list[Tensor]
    ) -> None:
        """Blocks that are here alone go with the others; those that are not become edges."""
        if self.edges is None:
            self.edges = Edges(part, self.maps, self.blocksize)
        p, g, codes = param.view(-1), grad.reshape(-1), [state.view(-1) for state in states]
        (low, high), runs = split(part, self.blocksize)
        first, _ = part.blocks(self.blocksize)
        if low < high:
            block = (part.start + low) // self.blocksize - first
            count = -(-(high - low) // self.blocksize)
            self.params.append(p[low:high])
            self.grads.append(g[low:high])
            self.states += [code[low:high] for code in codes]
            self.absmax += [scale[block : block + count] for scale in absmax]
        for start, stop, block in runs:
            scales = [scale[block - first : block - first + 1] for scale in absmax]
            slot = self.edges.slots + shared.index(block)
            edge = Edge(p[start:stop], g[start:stop], [code[start:stop] for code in codes], scales, slot)
            self.edges.found.append(edge)
        self.edges.slots += len(shared)

    def step(self, hyper: Tensor) -> None:
        """Step everything but the edges."""
        if self.prepared is not None:
            self.prepared(hyper, self.seed)
        elif not self.params:
            return
        else:
            self._call(hyper)
        if self.pager is not None:
            self.paged = self.states or self.paged
            self.pager.hold(self.paged)

    def ready(self, like: Tensor) -> bool:
        """Whether :meth:`step` needs no tensors: it repeats a prepared call, and nothing listens to ops on ``like``."""
        return self.prepared is not None and registry.undisturbed(like)

    def prepare(self) -> None:
        """Let the backend keep what it can of the call, for :meth:`step` to repeat it."""
        self.prepared = None
        if not registry.undisturbed(self.params[0]):
            return
        lists, rest = (self.params, self.grads, self.states), (self.rule.name, self.skip_zeros)
        if self.blocksize:
            more = (self.absmax, self.maps, self.blocksize)
            self.prepared = registry.prepare("optimizer_step_8bit", *lists, *more, *rest)
        else:
            self.prepared = registry.prepare("optimizer_step_32bit", *lists, *rest)

    def _call(self, hyper: Tensor) -> None:
        lists, rest = (self.params, self.grads, self.states), (self.rule.name, self.skip_zeros, self.seed)
        if self.blocksize:
            _ops.optimizer_step_8bit(*lists, self.absmax, self.maps, hyper, self.blocksize, *rest)
        else:
            _ops.optimizer_step_32bit(*lists, hyper, *rest)

    def step_edges(self, edges: Edges, hyper: Tensor) -> list[Tensor]:
        """Step the edges' values in fp32; returns the new states (edges, blocksize)."""
        if not edges.found:
            return []
        values = edges.decode()
        params, grads = [edge.param for edge in edges.found], [edge.grad for edge in edges.found]
        _ops.optimizer_step_32bit(params, grads, edges.rows(values), hyper, self.rule.name, self.skip_zeros, self.seed)
        return values


def run(buckets: Iterable[Bucket], hyper_of: Callable[[Bucket], Tensor]) -> None:
    """Step all buckets, then agree with the other processes on the blocks that are shared."""
    cut: dict[Any, list[tuple[Edges, list[Tensor], Tensor]]] = {}
    for bucket in buckets:
        hyper = hyper_of(bucket)
        bucket.step(hyper)
        if bucket.edges is not None:
            values = bucket.step_edges(bucket.edges, hyper)
            found = cut.setdefault(bucket.edges.part.group, [])
            found.append((bucket.edges, values, bucket.edges.largest(values)))
    for batches in cut.values():
        agree([(edges, scales) for edges, _, scales in batches])
        for edges, values, scales in batches:
            edges.encode(values, scales)
