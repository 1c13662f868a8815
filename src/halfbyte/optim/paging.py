"""States in pinned host memory: pieces of them visit the device, while the piece before is stepped and stored.

Three streams and three buffers a device: one stream fetches, the caller's own steps, one stores. Nothing waits for the
device but :meth:`Pager.finish`. Pinned memory, not managed: a managed page moves when it is touched, not before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["SMALLEST", "Pager", "Pagers", "Piece", "loads", "pageable", "pages", "pinned_zeros"]

SMALLEST = 100_000
"""Values from which a state is paged, as in bitsandbytes."""

PIECE = 1 << 23
"""Values that are on the device at once, three times over; a multiple of every block size."""

BUFFERS = 3

Step = Callable[[list[Tensor], list[Tensor], list[Tensor], list[Tensor]], None]
"""Steps (parameters, gradients, states, scales) on the device."""


def pageable(p: Tensor) -> bool:
    """Whether states of ``p`` can be paged: it is on a CUDA device, whole, contiguous and large enough."""
    return p.device.type == "cuda" and type(p.detach()) is Tensor and p.is_contiguous() and p.numel() >= SMALLEST


def pages(is_paged: bool, p: Tensor, state: dict[str, Any]) -> bool:
    """Whether an optimizer's states of ``p`` are in host memory, and ``p`` is not."""
    return is_paged and state["state1"].device.type == "cpu" and pageable(p)


def pinned_zeros(shape: Sequence[int], dtype: torch.dtype, owner: str) -> Tensor | None:
    """Zeros in pinned host memory; None, with a warning, where the system has none left to pin."""
    try:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        warnings.warn(
            f"{owner}: {torch.Size(shape).numel() * dtype.itemsize} bytes of host memory could not be pinned "
            f"({str(error).splitlines()[0]}): this state stays on the device, unpaged. "
            "Raise the limit of locked memory (ulimit -l) or free host memory",
            stacklevel=4,
        )
        return None


@dataclass
class Piece:
    """A run of a parameter's values: views of parameter, gradient and scales on the device, of states on the host."""

    param: Tensor
    grad: Tensor
    states: list[Tensor]
    absmax: list[Tensor]


@dataclass
class _Load:
    """What is on the device at once."""

    pieces: list[Piece] = field(default_factory=list[Piece])
    values: int = 0


def _aligned(values: int) -> int:
    return -(-values // 64) * 64


def loads(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    absmax: Sequence[Tensor],
    blocksize: int,
    size: int = PIECE,
) -> Iterator[list[Piece]]:
    """Pieces of at most ``size`` values together, cut between blocks; every value once, in order.

    Args:
        params: Contiguous parameters.
        grads: Their gradients.
        states: Those of the first parameter first.
        absmax: The same for scales; empty for fp32 states.
        blocksize: Values per scale; 0 for fp32 states.
        size: A multiple of the block size.
    """
    count, load = len(states) // max(len(params), 1), _Load()
    for place, (p, g) in enumerate(zip(params, grads, strict=True)):
        own = [state.view(-1) for state in states[count * place : count * (place + 1)]]
        scales = absmax[count * place : count * (place + 1)]
        flat, gradient, start = p.view(-1), g.reshape(-1), 0
        while start < flat.numel():
            room = (size - load.values) // (blocksize or 64) * (blocksize or 64)
            stop = min(start + room, flat.numel())
            if stop > start:
                blocks = slice(start // blocksize, -(-stop // blocksize)) if blocksize else slice(0)
                load.pieces.append(
                    Piece(
                        flat[start:stop],
                        gradient[start:stop],
                        [state[start:stop] for state in own],
                        [scale[blocks] for scale in scales],
                    )
                )
                load.values += _aligned(stop - start)
            if stop < flat.numel() or load.values >= size:
                yield load.pieces
                load = _Load()
            start = stop
    if load.pieces:
        yield load.pieces


class _Buffer:
    """Room for the states of one load on the device, and what must have happened before it is filled again."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.states = [torch.empty(PIECE + 64, dtype=dtype, device=device) for _ in range(count)]
        self.loaded, self.stepped, self.free = (torch.cuda.Event() for _ in range(3))

    def views(self, pieces: Sequence[Piece]) -> list[list[Tensor]]:
        """A view for each state of each piece."""
        found: list[list[Tensor]] = []
        start = 0
        for piece in pieces:
            numel = piece.param.numel()
            found.append([state[start : start + numel] for state in self.states])
            start += _aligned(numel)
        return found


class Pager:
    """Pages the states of one optimizer on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._fetch, self._store = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._buffers: dict[tuple[int, torch.dtype], list[_Buffer]] = {}

    def _buffers_for(self, count: int, dtype: torch.dtype) -> list[_Buffer]:
        key = (count, dtype)
        if key not in self._buffers:
            self._buffers[key] = [_Buffer(count, dtype, self._device) for _ in range(BUFFERS)]
            for buffer in self._buffers[key]:
                for state in buffer.states:
                    state.record_stream(self._store)
            # The streams may touch them only after what the allocator gave their memory for before is done.
            self._fetch.wait_stream(torch.cuda.current_stream(self._device))
        return self._buffers[key]

    def run(self, work: Iterator[list[Piece]], count: int, dtype: torch.dtype, step: Step) -> None:
        """Fetch, step and store all pieces; returns before the device has done it."""
        buffers, own = self._buffers_for(count, dtype), torch.cuda.current_stream(self._device)
        self._fetch.wait_stream(self._store)  # what the last step stores, this one fetches
        for number, pieces in enumerate(work):
            buffer = buffers[number % BUFFERS]
            host = [state for piece in pieces for state in piece.states]
            device = [state for here in buffer.views(pieces) for state in here]
            with torch.cuda.stream(self._fetch):
                self._fetch.wait_event(buffer.free)
                torch._foreach_copy_(device, host, non_blocking=True)  # pyright: ignore[reportPrivateUsage]
                buffer.loaded.record(self._fetch)
            own.wait_event(buffer.loaded)
            step(
                [piece.param for piece in pieces],
                [piece.grad for piece in pieces],
                device,
                [scale for piece in pieces for scale in piece.absmax],
            )
            buffer.stepped.record(own)
            with torch.cuda.stream(self._store):
                self._store.wait_event(buffer.stepped)
                torch._foreach_copy_(host, device, non_blocking=True)  # pyright: ignore[reportPrivateUsage]
                buffer.free.record(self._store)

    def finish(self) -> None:
        """Wait until the states in host memory are those of the last step."""
        self._store.synchronize()


class Pagers(dict[torch.device, Pager]):
    """The pagers of one optimizer, each made when its device is first asked for."""

    def __missing__(self, device: torch.device) -> Pager:
        made = self[device] = Pager(device)
        return made

    def finish(self) -> None:
        """Wait until all states in host memory are those of the last step."""
        for pager in self.values():
            pager.finish()
