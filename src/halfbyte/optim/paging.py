"""States in pinned host memory: the kernel of a step reads and writes them there, over the bus.

Every multiprocessor has thousands of values on the way at once, in both directions, so that nothing has to be copied to
the device before. Pinned memory, not managed: a managed page moves when it is touched, not before.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["SMALLEST", "Pager", "Pagers", "pageable", "pages", "pinned_zeros"]

SMALLEST = 100_000
"""Values from which a state is paged, as in bitsandbytes."""


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


_Held = deque[tuple[torch.cuda.Event, Sequence[Tensor]]]


def _wait(held: _Held) -> None:
    for event, _ in held:
        event.synchronize()


class Pager:
    """Keeps the host memory of one optimizer's states on one device from being freed while a step still uses it.

    torch frees pinned memory when its tensor goes, whatever a kernel does with it meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: _Held = deque()
        # Not when the interpreter ends: then nothing is freed for others to use.
        weakref.finalize(self, _wait, self._held).atexit = False

    def hold(self, states: Sequence[Tensor]) -> None:
        """Keep these states until the device has done what it was told up to now; does not wait."""
        if torch.cuda.is_current_stream_capturing():
            return  # a graph's memory is for its owner to keep
        while self._held and self._held[0][0].query():
            self._held.popleft()
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._held.append((event, states))

    def finish(self) -> None:
        """Wait until the states in host memory are those of the last step."""
        torch.cuda.synchronize(self._device)
        self._held.clear()


class Pagers(dict[torch.device, Pager]):
    """The pagers of one optimizer, each made when its device is first asked for."""

    def __missing__(self, device: torch.device) -> Pager:
        made = self[device] = Pager(device)
        return made

    def finish(self) -> None:
        """Wait until all states in host memory are those of the last step."""
        for pager in self.values():
            pager.finish()
