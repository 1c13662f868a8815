"""Optimizer steps over lists of tensors: one call updates every parameter that shares its settings."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError
from halfbyte.formats import blocks
from halfbyte.ops import arguments as check
from halfbyte.ops.definition import define
from halfbyte.rules import FIELDS, rule_named

__all__ = ["NEAREST"]

NEAREST = -1
"""``seed`` that rounds parameters to nearest even; 0 and above rounds bf16 stochastically."""

_LARGEST_SEED = (1 << 31) - 1


def _check_common(
    params: list[Tensor], grads: list[Tensor], states: list[Tensor], hyper: Tensor, rule: str, seed: int
) -> int:
    """Refuse what no step could take; returns how many states each parameter has."""
    count = len(rule_named(rule).signed)
    if len(grads) != len(params) or len(states) != count * len(params):
        raise ArgumentError(
            f"{len(params)} parameters with {len(grads)} gradients and {len(states)} states",
            expected=f"as many gradients, and {count} states each for {rule!r}",
        )
    if hyper.dtype != torch.float32 or hyper.shape != (len(FIELDS),):
        raise ArgumentError(f"hyper is {hyper.dtype} {tuple(hyper.shape)}", expected=f"float32 ({len(FIELDS)},)")
    if not NEAREST <= seed <= _LARGEST_SEED:
        raise ArgumentError(f"seed is {seed}", expected=f"-1 (round to nearest) or 0 to {_LARGEST_SEED}")
    for place, (p, g) in enumerate(zip(params, grads, strict=True)):
        check.check_float(p, "the parameter")
        check.check_float(g, "the gradient")
        if g.numel() != p.numel():
            raise ArgumentError(f"gradient of {g.numel()} values for a parameter of {p.numel()}", expected="as many")
        for state in states[count * place : count * (place + 1)]:
            if state.numel() != p.numel():
                raise ArgumentError(f"state of {state.numel()} values for {p.numel()}", expected="as many")
    return count


def _check_32bit(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    hyper: Tensor,
    rule: str,
    skip_zeros: bool = False,
    seed: int = NEAREST,
) -> None:
    _check_common(params, grads, states, hyper, rule, seed)
    for state in states:
        if state.dtype != torch.float32:
            raise ArgumentError(f"state is {state.dtype}", expected="float32")


def _check_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    absmax: list[Tensor],
    maps: list[Tensor],
    hyper: Tensor,
    blocksize: int,
    rule: str,
    skip_zeros: bool = False,
    seed: int = NEAREST,
) -> None:
    count = _check_common(params, grads, states, hyper, rule, seed)
    blocks.check_blocksize_8bit(blocksize)
    if len(maps) != count or len(absmax) != len(states):
        raise ArgumentError(
            f"{len(maps)} maps and {len(absmax)} absmax for {len(states)} states of {rule!r}",
            expected=f"{count} maps and one absmax a state",
        )
    for code in maps:
        check.check_code(code, 256)
    for state, scales in zip(states, absmax, strict=True):
        if state.dtype != torch.uint8:
            raise ArgumentError(f"state is {state.dtype}", expected="uint8 codes")
        check.check_absmax(scales, state.numel(), blocksize)


def _check_norm(
    params: list[Tensor], grads: list[Tensor], states: list[Tensor], hyper: Tensor, rule: str, skip_zeros: bool = False
) -> None:
    _check_32bit(params, grads, states, hyper, rule, skip_zeros)


def _norms(
    params: list[Tensor], grads: list[Tensor], states: list[Tensor], hyper: Tensor, rule: str, skip_zeros: bool = False
) -> Tensor:
    return params[0].new_empty((len(params),), dtype=torch.float32)


def _nothing(*_args: object, **_named: object) -> None:
    return None


define(
    "optimizer_step_32bit(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor hyper, str rule,"
    " bool skip_zeros=False, int seed=-1) -> ()",
    check=_check_32bit,
    result=_nothing,
)
define(
    "optimizer_step_8bit(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] absmax, Tensor[] maps,"
    " Tensor hyper, int blocksize, str rule, bool skip_zeros=False, int seed=-1) -> ()",
    check=_check_8bit,
    result=_nothing,
)
define(
    "optimizer_update_norm(Tensor[] params, Tensor[] grads, Tensor[] states, Tensor hyper, str rule,"
    " bool skip_zeros=False) -> Tensor",
    check=_check_norm,
    result=_norms,
)
