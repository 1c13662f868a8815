"""Optimizer steps in plain torch: what a step means, element by element, on every device."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from halfbyte.backends.reference import coding
from halfbyte.backends.registry import implements
from halfbyte.formats import blocks
from halfbyte.rules import FIELDS, Rule, bind, encoding_map, rule_named

__all__ = ["optimizer_step_8bit", "optimizer_step_32bit", "optimizer_update_norm", "random_bits"]


class _Torch:
    """torch as the namespace of a rule; Python numbers are fp32."""

    @staticmethod
    def sqrt(x: Tensor) -> Tensor:
        # torch's fp32 root is off by one in a fifth of all values (MKL); through fp64 it is correctly rounded.
        return torch.sqrt(x) if x.device.type == "mps" else torch.sqrt(x.double()).float()

    @staticmethod
    def where(condition: Tensor, yes: Any, no: Any) -> Tensor:
        return torch.where(condition, _fp32(yes, condition), _fp32(no, condition))

    @staticmethod
    def maximum(x: Tensor, y: Any) -> Tensor:
        return torch.fmax(x, _fp32(y, x))

    @staticmethod
    def minimum(x: Tensor, y: Any) -> Tensor:
        return torch.fmin(x, _fp32(y, x))


def _fp32(value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float32, device=like.device)


@functools.cache
def _bound(name: str) -> tuple[Rule, Any]:
    rule = rule_named(name)
    return rule, bind(rule.function, _Torch)


def _numbers(hyper: Tensor, device: torch.device) -> SimpleNamespace:
    return SimpleNamespace(**dict(zip(FIELDS, hyper.to(device).unbind(), strict=True)))


def _evaluate(
    name: str, p: Tensor, g: Tensor, states: list[Tensor], h: SimpleNamespace, skip_zeros: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """New parameter, update and new states, all fp32 and flat, from fp32 ``p`` and ``g``.

    An element keeps its parameter and states where the update or a new state is not finite (a NaN or infinite gradient,
    an overflow), and with ``skip_zeros`` where the gradient is zero.
    """
    rule, function = _bound(name)
    active = g != 0 if skip_zeros else None
    g = g * h.grad_scale
    if rule.decay == "coupled":
        g = torch.where(h.weight_decay > 0, g + h.weight_decay * p, g)
    update, *fresh = function(g, *states, h)
    update = update * h.update_scale
    decayed = p
    if rule.decay == "decoupled":
        decayed = torch.where(h.weight_decay > 0, p - (h.lr * h.weight_decay) * p, p)
    stepped = decayed - h.lr * update
    ok = update.abs() < torch.inf
    for state in fresh:
        ok &= state.abs() < torch.inf
    if active is not None:
        ok &= active
    kept = [torch.where(ok, new, old) for new, old in zip(fresh, states, strict=True)]
    return torch.where(ok, stepped, p), torch.where(ok, update, 0.0), kept


def random_bits(numel: int, start: int, seed: int, device: torch.device) -> Tensor:
    """16 random bits for each of the elements ``start`` to ``start + numel``: int64, below 2**16.

    Counter-based (murmur3's finalizer over the element's number plus the seed times 2654435769, all modulo 2**32), so
    that every backend draws the same.
    """
    low = 0xFFFFFFFF
    x = (torch.arange(start, start + numel, device=device) & low) + ((seed * 0x9E3779B9) & low)
    x &= low
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & low
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & low
    return (x ^ (x >> 16)) & 0xFFFF


def _store(p: Tensor, flat: Tensor, start: int, seed: int) -> None:
    """Write fp32 values into part of ``p``, rounded to its dtype."""
    target = p[start : start + flat.numel()]
    if seed < 0 or p.dtype != torch.bfloat16:
        target.copy_(flat)
        return
    bits = flat.view(torch.int32)
    up = random_bits(flat.numel(), start, seed, p.device).int()
    rounded = ((bits + up) & -65536).view(torch.float32)
    target.copy_(torch.where(flat.isfinite(), rounded, flat))


def _flat(tensor: Tensor) -> Tensor:
    """Row-major elements: a view where there is one, else a copy."""
    return tensor.reshape(-1)


@implements("reference", "optimizer_step_32bit")
def optimizer_step_32bit(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    hyper: Tensor,
    rule: str,
    skip_zeros: bool = False,
    seed: int = -1,
) -> None:
    """Step every parameter and its fp32 states in place. ``states`` holds those of the first parameter first.

    States of parameters on a GPU may lie in pinned host memory.
    """
    count = len(rule_named(rule).signed)
    for place, (p, g) in enumerate(zip(params, grads, strict=True)):
        own = states[count * place : count * (place + 1)]
        h = _numbers(hyper, p.device)
        values, gradient, flat = _flat(p), _flat(g), [_flat(state) for state in own]
        for start, stop in coding.pieces(values.numel(), 1):
            parts = [state[start:stop].to(p.device) for state in flat]
            new, _, fresh = _evaluate(
                rule, values[start:stop].float(), gradient[start:stop].float(), parts, h, skip_zeros
            )
            _store(values, new, start, seed)
            for whole, state in zip(flat, fresh, strict=True):
                whole[start:stop] = state
        _write_back([p, *own], [values, *flat])


def _write_back(tensors: list[Tensor], flat: list[Tensor]) -> None:
    for tensor, values in zip(tensors, flat, strict=True):
        if not tensor.is_contiguous():
            tensor.copy_(values.view(tensor.shape))


@implements("reference", "optimizer_step_8bit")
def optimizer_step_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    absmax: list[Tensor],
    maps: list[Tensor],
    hyper: Tensor,
    blocksize: int,
    rule: str,
    skip_zeros: bool = False,
    seed: int = -1,
) -> None:
    """Step every parameter in place; states are codes of ``maps``: see also :func:`halfbyte.rules.encoding_map`."""
    count = len(rule_named(rule).signed)
    tables = [code.to(params[0].device).view(-1) for code in maps]
    midpoints = [coding.midpoints_of(encoding_map(table)) for table in tables]
    for place, (p, g) in enumerate(zip(params, grads, strict=True)):
        own = states[count * place : count * (place + 1)]
        scales = absmax[count * place : count * (place + 1)]
        h = _numbers(hyper, p.device)
        values, gradient, codes = _flat(p), _flat(g), [_flat(state) for state in own]
        for start, stop in coding.pieces(values.numel(), blocksize):
            first, last = start // blocksize, blocks.block_count(stop, blocksize)
            decoded = [
                torch.index_select(table, 0, code[start:stop].to(p.device).int())
                * coding.spread(scale[first:last], blocksize, stop - start)
                for table, code, scale in zip(tables, codes, scales, strict=True)
            ]
            new, _, fresh = _evaluate(
                rule, values[start:stop].float(), gradient[start:stop].float(), decoded, h, skip_zeros
            )
            _store(values, new, start, seed)
            for code, scale, middle, state in zip(codes, scales, midpoints, fresh, strict=True):
                scaled, largest = coding.scale_blocks(state, blocksize)
                scale[first:last] = largest
                code[start:stop] = coding.encode(scaled, middle)
        _write_back([p, *own], [values, *codes])


@implements("reference", "optimizer_update_norm")
def optimizer_update_norm(
    params: list[Tensor], grads: list[Tensor], states: list[Tensor], hyper: Tensor, rule: str, skip_zeros: bool = False
) -> Tensor:
    """Sum of squares of the update that each parameter is about to get, fp32 ``(len(params),)``; changes nothing."""
    count = len(rule_named(rule).signed)
    found: list[Tensor] = []
    for place, (p, g) in enumerate(zip(params, grads, strict=True)):
        own = [_flat(state) for state in states[count * place : count * (place + 1)]]
        h = _numbers(hyper, p.device)
        _, update, _ = _evaluate(rule, _flat(p).float(), _flat(g).float(), own, h, skip_zeros)
        found.append((update * update).sum())
    return torch.stack(found)
