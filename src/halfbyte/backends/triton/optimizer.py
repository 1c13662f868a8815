"""Launcher of optimizer steps: all parameters of a call in one launch, through a table of addresses."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from halfbyte.backends.registry import implements
from halfbyte.backends.triton.kernels.optimizer import _optimizer_kernel
from halfbyte.backends.triton.launch import on_device
from halfbyte.backends.triton.rules import function_of
from halfbyte.formats import ranks as formats
from halfbyte.rules import rule_named

__all__ = ["optimizer_step_8bit", "optimizer_step_32bit"]

VALUES = 1024
"""Values of one program."""

BLOCKSIZES = (256, 2048)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@functools.lru_cache(maxsize=64)
def _ranks_of(code: bytes, device: torch.device) -> tuple[Tensor, int, int, int] | str:
    found = formats.ranks(code)
    if isinstance(found, str):
        return found
    with torch.inference_mode(False):
        return torch.from_numpy(found.table.view(np.int32)).to(device), found.low, found.high, found.shift


_maps: dict[tuple[int, int, torch.device], tuple[Tensor, tuple[Tensor, int, int, int] | str]] = {}


def _ranks(code: Tensor) -> tuple[Tensor, int, int, int] | str:
    """Rank table of a map; its bytes are read from the device once, when the map is first seen."""
    key = (code.data_ptr(), code._version, code.device)
    if key not in _maps:
        if len(_maps) > 64:
            _maps.clear()
        # The map is kept, so that its address stays its own.
        _maps[key] = (code, _ranks_of(code.detach().cpu().contiguous().numpy().tobytes(), code.device))
    return _maps[key][1]


def _declines(params: list[Tensor], tensors: list[Tensor]) -> str | None:
    if any(not tensor.is_contiguous() for tensor in tensors):
        return "a tensor is not contiguous"
    if len({(p.device) for p in params}) > 1:
        return "parameters on several devices"
    return None


def _declines_32bit(
    params: list[Tensor], grads: list[Tensor], states: list[Tensor], hyper: Tensor, *_rest: Any, **_named: Any
) -> str | None:
    return _declines(params, [*params, *grads, *states])


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
    for code in maps:
        found = _ranks(code)
        if isinstance(found, str):
            return found
    return _declines(params, [*params, *grads, *states, *absmax])


def _groups(params: list[Tensor], grads: list[Tensor]) -> dict[tuple[torch.dtype, torch.dtype], list[int]]:
    """Places by dtypes of parameter and gradient; those without values are left out."""
    found: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for place, (p, g) in enumerate(zip(params, grads, strict=True)):
        if p.numel():
            found.setdefault((p.dtype, g.dtype), []).append(place)
    return found


def table_of(
    places: list[int],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    absmax: list[Tensor],
    count: int,
    values: int,
) -> tuple[Tensor, int]:
    """Words of every tensor, int64 ``(tensors, 10)`` on their device; programs, each of ``values`` values."""
    rows: list[tuple[int, ...]] = []
    programs = 0
    for place in places:
        own = [state.data_ptr() for state in states[count * place : count * (place + 1)]]
        scales = [scale.data_ptr() for scale in absmax[count * place : count * (place + 1)]]
        numel = params[place].numel()
        addresses = [*own, *[0] * (3 - count), *scales, *[0] * (3 - len(scales))]
        rows.append((params[place].data_ptr(), grads[place].data_ptr(), *addresses, numel, programs))
        programs += -(-numel // values)
    return _words(tuple(rows), params[0].device), programs


@functools.lru_cache(maxsize=32)
def _words(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    # Kept: a step with the same tensors copies nothing to the device, so that it can be captured in a graph.
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int64).to(device)


def _launch(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    absmax: list[Tensor],
    maps: list[Tensor],
    hyper: Tensor,
    blocksize: int,
    name: str,
    skip_zeros: bool,
    seed: int,
) -> None:
    kernel: Any = _optimizer_kernel
    rule = rule_named(name)
    count, device = len(rule.signed), params[0].device
    rows = max(1, VALUES // blocksize)
    tables: list[tuple[Tensor, int, int, int]] = []
    for code in maps:
        found = _ranks(code)
        if not isinstance(found, str):
            tables.append(found)
    codes = [code.contiguous() for code in maps]
    with on_device(device.index):
        numbers = hyper.to(device, non_blocking=True)
        codes += [numbers] * (3 - len(codes))
        tables += [(numbers, 0, 0, 1)] * (3 - len(tables))
        for (p, g), places in _groups(params, grads).items():
            words, programs = table_of(places, params, grads, states, absmax, count, rows * blocksize)
            kernel[(programs,)](
                words,
                len(places),
                numbers,
                max(seed, 0),
                *codes,
                *(table for table, _, _, _ in tables),
                *(low for _, low, _, _ in tables),
                *(high for _, _, high, _ in tables),
                *(shift for _, _, _, shift in tables),
                RULE=function_of(rule.name),
                STATES=count,
                COUPLED=rule.decay == "coupled",
                P=TYPES[p],
                G=TYPES[g],
                EIGHT=bool(maps),
                SKIP_ZEROS=skip_zeros,
                RANDOM=seed >= 0 and p == torch.bfloat16,
                BLOCKSIZE=blocksize,
                ROWS=rows,
                num_warps=4 if blocksize <= VALUES else 8,
                enable_fp_fusion=False,
            )


@implements("triton", "optimizer_step_32bit", declines=_declines_32bit)
def optimizer_step_32bit(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    hyper: Tensor,
    rule: str,
    skip_zeros: bool = False,
    seed: int = -1,
) -> None:
    """Step every parameter and its fp32 states in place, one launch for each pair of dtypes."""
    _launch(params, grads, states, [], [], hyper, VALUES, rule, skip_zeros, seed)


@implements("triton", "optimizer_step_8bit", declines=_declines_8bit)
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
    """Step every parameter and its 8-bit states in place, one launch for each pair of dtypes."""
    _launch(params, grads, states, absmax, maps, hyper, blocksize, rule, skip_zeros, seed)
