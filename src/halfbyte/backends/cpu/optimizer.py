"""Optimizer steps on the CPU: one pass over parameter, gradient and states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.backends.cpu import ranks as tables
from halfbyte.backends.cpu.call import DTYPES, kernel
from halfbyte.backends.registry import implements
from halfbyte.rules import rule_named

__all__ = ["optimizer_step_8bit", "optimizer_step_32bit"]

PIECE = 1 << 15
"""Elements of one piece of work."""

UNIT = 256
"""Elements that fp32 states are stepped in; every level's registers divide it."""

BLOCKSIZES = (256, 2048)


class _Tail:
    """The elements behind the last whole block, filled up with zeros to one block, and brought back afterwards."""

    def __init__(self, tensors: list[Tensor], start: int, size: int) -> None:
        self.parts = [tensor[start:] for tensor in tensors]
        self.filled = [torch.zeros(size, dtype=tensor.dtype) for tensor in tensors]
        for part, whole in zip(self.parts, self.filled, strict=True):
            whole[: part.numel()] = part

    def bring_back(self) -> None:
        for part, whole in zip(self.parts, self.filled, strict=True):
            part.copy_(whole[: part.numel()])


def _flat(tensors: list[Tensor]) -> list[Tensor]:
    """Row-major elements: views where there are some, else copies."""
    return [tensor.detach().reshape(-1) for tensor in tensors]


def _write_back(tensors: list[Tensor], flat: list[Tensor]) -> None:
    for tensor, values in zip(tensors, flat, strict=True):
        if not tensor.is_contiguous():
            tensor.copy_(values.view(tensor.shape))


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in _flat(tensors)]


def _launch(run: Any, blocks: int, blocksize: int, tensors: list[Tensor], tail: list[int]) -> None:
    p, g, *states = tensors
    a_piece = max(1, PIECE // blocksize)
    addresses = [state.data_ptr() for state in states] + [0] * (3 - len(states))
    run(-(-blocks // a_piece), p.data_ptr(), g.data_ptr(), *addresses, *tail[:3], blocks, a_piece, *tail[3:])


def _variant(
    name: str, rule: str, p: Tensor, g: Tensor, blocksize: int, skip_zeros: bool, seed: int, **more: str
) -> Any:
    return kernel(
        name,
        rule=rule_named(rule).name,
        dtype=DTYPES[p.dtype],
        grad=DTYPES[g.dtype],
        blocksize=blocksize,
        skip_zeros=skip_zeros,
        random=seed >= 0 and p.dtype == torch.bfloat16,
        **more,
    )


def _declines_device(hyper: Tensor) -> str | None:
    return "hyper is not on the CPU" if hyper.device.type != "cpu" else None


def _declines_32bit(
    params: list[Tensor], grads: list[Tensor], states: list[Tensor], hyper: Tensor, *_rest: Any, **_named: Any
) -> str | None:
    return _declines_device(hyper)


@implements("cpu", "optimizer_step_32bit", declines=_declines_32bit)
def optimizer_step_32bit(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    hyper: Tensor,
    rule: str,
    skip_zeros: bool = False,
    seed: int = -1,
) -> None:
    """Step every parameter and its fp32 states in place."""
    count, hyper = len(rule_named(rule).signed), hyper.contiguous()
    for place, (p, g) in enumerate(zip(params, grads, strict=True)):
        own = [p, g, *states[count * place : count * (place + 1)]]
        flat = _contiguous(own)
        run = _variant("optimizer_32bit", rule, p, g, UNIT, skip_zeros, seed)
        whole = p.numel() // UNIT
        _launch(run, whole, UNIT, flat, [hyper.data_ptr(), seed, 0])
        if p.numel() % UNIT:
            tail = _Tail(flat, whole * UNIT, UNIT)
            _launch(run, 1, UNIT, tail.filled, [hyper.data_ptr(), seed, whole * UNIT])
            tail.bring_back()
        _write_back([own[0], *own[2:]], [flat[0], *flat[2:]])


def _tables(maps: list[Tensor]) -> list[tables.Ranks] | str:
    found = [tables.ranks(code.detach().contiguous().numpy().tobytes()) for code in maps]
    reasons = [one for one in found if isinstance(one, str)]
    return reasons[0] if reasons else [one for one in found if not isinstance(one, str)]


def _declines_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    absmax: list[Tensor],
    maps: list[Tensor],
    hyper: Tensor,
    blocksize: int,
    *_rest: Any,
    **_named: Any,
) -> str | None:
    if blocksize not in BLOCKSIZES:
        return f"blocksize {blocksize} is not {' or '.join(map(str, BLOCKSIZES))}"
    if not all(scale.is_contiguous() for scale in absmax):
        return "absmax is not contiguous"
    found = _tables(maps)
    return found if isinstance(found, str) else _declines_device(hyper)


@implements("cpu", "optimizer_step_8bit", declines=_declines_8bit)
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
    """Step every parameter and its 8-bit states in place."""
    count, hyper, found = len(maps), hyper.contiguous(), _tables(maps)
    codes = [code.detach().contiguous() for code in maps]
    signs = "".join("s" if not isinstance(one, str) and one.signed else "u" for one in found)
    for place, (p, g) in enumerate(zip(params, grads, strict=True)):
        own = [p, g, *states[count * place : count * (place + 1)]]
        scales = absmax[count * place : count * (place + 1)]
        flat = _contiguous(own)
        run = _variant("optimizer_8bit", rule, p, g, blocksize, skip_zeros, seed, signs=signs)
        whole = p.numel() // blocksize
        maps_at = _addresses(scales, codes, found, 0)
        _launch(run, whole, blocksize, flat, [hyper.data_ptr(), seed, 0, *maps_at])
        if p.numel() % blocksize:
            # Filled up with zeros: a zero gradient leaves a zero state at zero, which does not change the absmax.
            tail = _Tail(flat, whole * blocksize, blocksize)
            for state, code in zip(tail.filled[2:], codes, strict=True):
                state[p.numel() % blocksize :] = int((code == 0).nonzero()[0])
            maps_at = _addresses(scales, codes, found, whole)
            _launch(run, 1, blocksize, tail.filled, [hyper.data_ptr(), seed, whole * blocksize, *maps_at])
            tail.bring_back()
        _write_back([own[0], *own[2:]], [flat[0], *flat[2:]])


def _addresses(scales: list[Tensor], codes: list[Tensor], found: list[tables.Ranks] | str, block: int) -> list[int]:
    listed: list[int] = []
    for scale, code, one in zip(scales, codes, found, strict=True):
        if not isinstance(one, str):
            address = scale.data_ptr() + 4 * block
            listed += [address, code.data_ptr(), one.table.address, one.shift]
    return listed + [0] * (12 - len(listed))
