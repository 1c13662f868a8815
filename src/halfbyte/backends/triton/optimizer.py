"""Launcher of optimizer steps: all parameters of a call in one launch, through a table of addresses."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from halfbyte.backends.registry import implements
from halfbyte.backends.triton.kernels import optimizer as kernels
from halfbyte.backends.triton.launch import Launcher, on_device, raw_stream
from halfbyte.backends.triton.rules import function_of
from halfbyte.formats.dynamic import dynamic_map
from halfbyte.rules import FIELDS, encoding_map, rule_named

__all__ = ["Launch", "optimizer_step_8bit", "optimizer_step_32bit", "plan"]

VALUES = 1024
"""Values of one program."""

BLOCKSIZES = (256, 2048)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class _Map:
    """A code map on its device: how codes are found, and what a value must exceed to get each (``encoding_map``)."""

    kind: int
    cuts: Tensor


@functools.lru_cache(maxsize=64)
def _map_of(code: bytes, device: torch.device) -> _Map | str:
    values = np.frombuffer(code, np.float32)
    if not np.isfinite(values).all() or (np.diff(values) <= 0).any():
        return "the code map does not rise from value to value"
    kind = 0
    for number, signed in ((1, True), (2, False)):
        if code == dynamic_map(signed).tobytes():
            kind = number
    apart = encoding_map(values)
    middle = (apart[:-1] + apart[1:]) * np.float32(0.5)
    cuts = np.concatenate([np.asarray([-np.inf], np.float32), middle])
    with torch.inference_mode(False):
        return _Map(kind, torch.from_numpy(cuts).to(device))


_maps: dict[tuple[int, int, torch.device], tuple[Tensor, _Map | str]] = {}


def _find(code: Tensor) -> _Map | str:
    """What is known of a map; its bytes are read from the device once, when the map is first seen."""
    key = (code.data_ptr(), code._version, code.device)
    if key not in _maps:
        if len(_maps) > 64:
            _maps.clear()
        # The map is kept, so that its address stays its own.
        _maps[key] = (code, _map_of(code.detach().cpu().contiguous().numpy().tobytes(), code.device))
    return _maps[key][1]


def _declines(params: list[Tensor], tensors: list[Tensor]) -> str | None:
    if not all(map(Tensor.is_contiguous, tensors)):
        return "a tensor is not contiguous"
    if len({p.device for p in params}) > 1:
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
        found = _find(code)
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


@dataclass(frozen=True)
class Launch:
    """One launch of the kernel.

    Attributes:
        masked: Whether it is for odd addresses and short ends, or for whole programs at addresses that divide by 16.
        table: Words of every tensor, int64 ``(tensors, 10)``.
        owners: Tensor of each program, int32.
    """

    masked: bool
    table: Tensor
    owners: Tensor


MOST_ROWS = 4096
"""Tensors whose addresses are kept on the device, in all plans together but the last: gradients often move."""

_lock = threading.Lock()
_plans: OrderedDict[tuple[Any, ...], tuple[Launch, ...]] = OrderedDict()
_captured: dict[int, Launch] = {}
"""Launches that a CUDA graph repeats, which nobody says is gone."""


def plan(addresses: bytes, sizes: tuple[int, ...], each: int, device: torch.device) -> tuple[Launch, ...]:
    """The launches that step these tensors: whole programs, then what is left.

    Kept: a step with the same tensors copies nothing to the device, so that it can be captured in a graph.

    Args:
        addresses: Eight int64 for each tensor: parameter, gradient, three states, three absmax.
        sizes: Values of each tensor.
        each: Values of one program.
        device: Where they are.
    """
    key = (addresses, sizes, each, device)
    with _lock:  # steps inside the backward pass come from its threads
        found = _plans.get(key)
        if found is not None:
            _plans.move_to_end(key)
            return found
        found = _plans[key] = _planned(addresses, sizes, each, device)
        rows = sum(len(other[1]) for other in _plans)
        while rows > MOST_ROWS and len(_plans) > 1:
            rows -= len(_plans.popitem(last=False)[0][1])
    return found


def _planned(addresses: bytes, sizes: tuple[int, ...], each: int, device: torch.device) -> tuple[Launch, ...]:
    words, values = np.frombuffer(addresses, np.int64).reshape(len(sizes), 8), np.asarray(sizes, np.int64)
    odd = (words[:, :5] % 16).any(axis=1)
    whole = np.where(odd, 0, values // each)
    launches: list[Launch] = []
    for masked, counts, before in ((False, whole, 0 * whole), (True, -(-values // each) - whole, whole)):
        if not counts.any():
            continue
        # A tensor's first program here steps what lies behind the programs before.
        table = np.column_stack([words, values, np.cumsum(counts) - counts - before])
        with torch.inference_mode(False):
            moved = torch.from_numpy(table).to(device, non_blocking=True)
        launches.append(Launch(masked, moved, _owners(counts.tobytes(), device)))
    return tuple(launches)


@functools.lru_cache(maxsize=16)
def _owners(counts: bytes, device: torch.device) -> Tensor:
    """The tensor of each program, int32, where tensor by tensor has so many (int64) programs."""
    programs = np.frombuffer(counts, np.int64)
    owners = np.repeat(np.arange(len(programs), dtype=np.int32), programs)
    with torch.inference_mode(False):
        return torch.from_numpy(owners).to(device, non_blocking=True)


def _addresses(
    places: list[int],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    absmax: list[Tensor],
    count: int,
) -> bytes:
    """For :func:`plan`."""
    words = np.zeros((len(params), 8), np.int64)
    words[:, 0] = [p.data_ptr() for p in params]
    words[:, 1] = [g.data_ptr() for g in grads]
    words[:, 2 : 2 + count] = np.asarray([state.data_ptr() for state in states]).reshape(-1, count)
    if absmax:
        words[:, 5 : 5 + count] = np.asarray([scale.data_ptr() for scale in absmax]).reshape(-1, count)
    return words[places].tobytes()


@functools.cache
def _speaks_ptx(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU with instructions for pairs of halves: sm_80 on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8


def _prepared(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    absmax: list[Tensor],
    maps: list[Tensor],
    blocksize: int,
    name: str,
    skip_zeros: bool,
) -> Callable[[Tensor, int], None]:
    """The launches of a step, with all that stays the same from step to step; takes ``hyper`` and ``seed``."""
    rule = rule_named(name)
    count, device = len(rule.signed), params[0].device
    found = [one for one in map(_find, maps) if not isinstance(one, str)]
    kinds = [one.kind for one in found] + [0] * (3 - len(maps))
    # The kernel is compiled for tables at addresses that divide by 16.
    codes = [code.contiguous() if code.data_ptr() % 16 == 0 else code.clone() for code in maps]
    ptx = _speaks_ptx(device)
    with on_device(device.index):
        launches = [
            (launch, p, g)
            for (p, g), places in _groups(params, grads).items()
            for launch in plan(
                _addresses(places, params, grads, states, absmax, count),
                tuple([params[place].numel() for place in places]),
                max(VALUES, blocksize),
                device,
            )
        ]
    # Rules with fewer states, and those with fp32 ones, do not look at the rest.
    unused = [launches[0][0].table] * (3 - len(maps)) if launches else []
    tables = (*codes, *unused, *(one.cuts for one in found), *unused)
    kind = (function_of(rule.name, ptx), count, rule.decay == "coupled")

    def launcher_for(launch: Launch, p: torch.dtype, g: torch.dtype, random: bool, loaded: bool) -> Launcher:
        shape = (blocksize, max(VALUES // blocksize, 1))
        flags = (bool(maps), launch.masked, skip_zeros, random and p == torch.bfloat16, loaded, ptx)
        options = _options(count, blocksize, bool(maps), ptx, loaded)
        return _launcher(device.index, (*kind, TYPES[p], TYPES[g], *kinds, *flags, *shape), options)

    def run(hyper: Tensor, seed: int) -> None:
        loaded = hyper.device.type != "cpu"
        numbers = [0.0] * len(FIELDS) if loaded else hyper.tolist()
        captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with on_device(device.index):
            for launch, p, g in launches:
                if captured:
                    _captured[id(launch)] = launch
                launcher = launcher_for(launch, p, g, seed >= 0, loaded)
                pointers = (launch.table, launch.owners, hyper if loaded else launch.table)
                programs = launch.owners.numel()
                if not launcher.compiled():
                    launcher.ordinary((programs,), *pointers, max(seed, 0), *tables, *numbers)
                    continue
                stream, first = raw_stream(device.index), [tensor.data_ptr() for tensor in pointers]
                rest = [tensor.data_ptr() for tensor in tables]
                launcher.direct((programs, 1, 1), stream, *first, max(seed, 0), *rest, *numbers)

    return run


@functools.lru_cache(maxsize=256)
def _launcher(index: int, constants: tuple[Any, ...], options: tuple[tuple[str, int], ...]) -> Launcher:
    """One for each specialisation and device (``index``): the compiled kernel belongs to it."""
    return Launcher(kernels._optimizer_kernel, constants, enable_fp_fusion=False, **dict(options))


def _options(count: int, blocksize: int, eight: bool, ptx: bool, loaded: bool) -> tuple[tuple[str, int], ...]:
    """Measured on an H100 over 268 million bf16 values (benchmarks/gpu_optim.py), as shares of a copy's rate.

    Two 8-bit states: 2 warps 0.91, 4 warps 0.87; with numbers that are ``loaded`` 0.67 and 0.77. Three: 4 warps 0.65,
    with registers for 24 warps at once 0.69.
    """
    if not eight or blocksize != BLOCKSIZES[0] or count == 1:
        return (("num_warps", 4),)
    if count == 2:
        return (("num_warps", 4 if loaded else 2),)
    return (("num_warps", 4), ("maxnreg", 80)) if ptx else (("num_warps", 4),)


def _prepare_32bit(
    params: list[Tensor], grads: list[Tensor], states: list[Tensor], rule: str, skip_zeros: bool
) -> Callable[[Tensor, int], None] | None:
    if _declines(params, [*params, *grads, *states]) is not None:
        return None
    return _prepared(params, grads, states, [], [], VALUES, rule, skip_zeros)


def _prepare_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    absmax: list[Tensor],
    maps: list[Tensor],
    blocksize: int,
    rule: str,
    skip_zeros: bool,
) -> Callable[[Tensor, int], None] | None:
    if _declines_8bit(params, grads, states, absmax, maps, params[0], blocksize) is not None:
        return None
    return _prepared(params, grads, states, absmax, maps, blocksize, rule, skip_zeros)


@implements("triton", "optimizer_step_32bit", declines=_declines_32bit, prepare=_prepare_32bit)
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
    _prepared(params, grads, states, [], [], VALUES, rule, skip_zeros)(hyper, seed)


@implements("triton", "optimizer_step_8bit", declines=_declines_8bit, prepare=_prepare_8bit)
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
    _prepared(params, grads, states, absmax, maps, blocksize, rule, skip_zeros)(hyper, seed)
