"""How kernels are started: on the tensors' device and its current stream; hot ones straight through their compiled
form.

Triton's ordinary ``kernel[grid](...)`` binds, specialises and looks up about 20 arguments in every call, which costs
the
host more than most of these kernels cost the GPU. A compiled kernel can be launched directly, if the caller has made
sure
that the arguments are specialised alike: same dtypes, same alignment, same divisibility by 16.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from halfbyte.backends.triton.cache_keys import settle
from halfbyte.errors import ArgumentError

__all__ = [
    "ALIGNMENT",
    "DIRECT",
    "Launcher",
    "aligned",
    "allocation",
    "check_devices",
    "dense",
    "on_device",
    "on_its_device",
    "raw_stream",
    "start",
]

ALIGNMENT = 16
"""Bytes to which tensors must be aligned for kernels to be compiled for wide loads."""

DIRECT_VERSIONS = frozenset({(3, 6), (3, 9)})
"""Triton versions whose compiled kernels take (grid, stream, function, metadata, three hooks, every argument)."""

_version = tuple(int(part) for part in triton.__version__.split(".")[:2])
DIRECT = _version in DIRECT_VERSIONS and torch.version.hip is None
_empty_strided_cuda: Any = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)  # pyright: ignore
"""What torch's compiled code allocates with: around the dispatcher, in less than half of the host time."""


def aligned(*tensors: Tensor | None) -> bool:
    """Whether every tensor begins where kernels may load widely."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return addresses % ALIGNMENT == 0


def check_devices(what: str, owner: str, *tensors: Tensor | None) -> None:
    """Refuse tensors that no GPU can read: their addresses would end the process's use of the GPU.

    Args:
        what: They are parts of, ``"weight"``.
        owner: What the user moves, ``"layer"``.
        tensors: All but the activation.

    Raises:
        ArgumentError: One is not on a GPU.
    """
    for tensor in tensors:
        if tensor is not None and not tensor.is_cuda:
            raise ArgumentError(
                f"a tensor of the 4-bit {what} is on {tensor.device}",
                expected="all on the activation's GPU",
                hint=f"move the {owner}, not its tensors: {owner}.to(device) takes the quant_state along",
            )


def dense(tensor: Tensor | None) -> Any:
    """The tensor as kernels read it: without gaps."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def raw_stream(index: int) -> int:
    """The current stream of a device, as the driver's handle."""
    return torch._C._cuda_getCurrentRawStream(index)  # pyright: ignore[reportPrivateUsage]


def allocation(shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    """What makes an empty, contiguous tensor beside an activation, on the current device.

    Args:
        shape: Of the tensor.
        dtype: None is the activation's.
    """
    if _empty_strided_cuda is None or not torch.cuda.is_initialized():
        return lambda x: x.new_empty(shape, dtype=dtype)
    empty = _empty_strided_cuda
    strides = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
    return lambda x: empty(shape, strides, x.dtype if dtype is None else dtype)


def on_device(index: int) -> contextlib.AbstractContextManager[Any]:
    """A guard that makes ``index`` the current device, free of charge where it is."""
    if torch.cuda.current_device() == index:
        return contextlib.nullcontext()
    return torch.cuda.device(index)


def on_its_device(call: Callable[[Tensor], Any], index: int) -> Callable[[Tensor], Any]:
    """``call`` with ``index`` as the current device: itself where there is no other."""
    if torch.cuda.device_count() == 1:
        return call

    def guarded(x: Tensor) -> Any:
        with on_device(index):
            return call(x)

    return guarded


def _starter(run: Any, function: Any, metadata: Any) -> tuple[Any, tuple[Any, ...]]:
    """What starts a compiled kernel, and what it takes between the stream and the kernel's arguments.

    In Triton 3.6 ``run`` makes scratch memory and calls ``run.launch``; a kernel that needs none goes there at once.
    """
    if _version != (3, 6) or run.global_scratch_size or run.profile_scratch_size:
        return run, (function, metadata, None, None, None)
    flags = (run.launch_cooperative_grid, run.launch_pdl)
    return run.launch, (function, *flags, None, None, metadata, None, None, None)


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch through Triton's own call on the current device and stream."""
    settle(kernel)
    kernel[grid](*args, **options)


class Launcher:
    """One kernel with one specialisation on one device: compiled by its first call, then launched directly.

    Args:
        kernel: A ``triton.jit`` or ``gluon.jit`` function whose run-time parameters precede its constants.
        constants: Its compile-time parameters, in order.
        options: ``num_warps`` and the like.
    """

    __slots__ = ("_constants", "_function", "_kernel", "_metadata", "_options", "_run")

    def __init__(self, kernel: Any, constants: tuple[Any, ...], **options: Any) -> None:
        self._kernel = kernel
        self._constants = constants
        self._options = options
        self._run: Any = None
        self._function: Any = None
        self._metadata: Any = None

    def compiled(self) -> bool:
        """Whether :meth:`direct` may be used."""
        return self._run is not None

    def ordinary(self, grid: tuple[int, ...], *args: Any) -> None:
        """Launch through Triton's own call, with tensors for pointers; keeps the compiled kernel."""
        settle(self._kernel)
        compiled = self._kernel[grid](*args, *self._constants, **self._options)
        if DIRECT and compiled is not None:
            self._function = compiled.function
            self._metadata = compiled.packed_metadata
            self._run = compiled.run

    def direct(self, grid: tuple[int, int, int], stream: int, *args: Any) -> None:
        """Launch the compiled kernel, with addresses for pointers."""
        self._run(
            grid[0], grid[1], grid[2], stream, self._function, self._metadata, None, None, None, *args, *self._constants
        )

    def opened(self) -> tuple[Any, tuple[Any, ...]]:
        """What starts the kernel, which is compiled, and what it takes between stream and arguments.

        It takes the kernel's constants as well, after its arguments.
        """
        return _starter(self._run, self._function, self._metadata)

    def repeated(
        self,
        grid: tuple[int, int, int],
        index: int,
        shape: tuple[int, ...],
        before: tuple[Tensor, ...],
        between: tuple[Tensor | None, ...],
        after: tuple[Tensor, ...],
        numbers: tuple[int, ...],
        dtype: torch.dtype | None = None,
    ) -> Callable[[Tensor], Tensor | None] | None:
        """A function of the activation alone that allocates the result and launches; None before :meth:`ordinary` ran.

        It gives None, and launches nothing, where its activation is aligned less than the kernel was compiled for.

        Args:
            grid: Programs.
            index: Of the device, which is current when the result is called.
            shape: Of the result.
            before: What the kernel takes before the activation.
            between: What it takes between activation and result.
            after: What it takes after the result; kept alive.
            numbers: What follows.
            dtype: Of the result; None is the activation's.
        """
        if self._run is None:
            return None
        stream = torch._C._cuda_getCurrentRawStream  # pyright: ignore[reportPrivateUsage]
        run, fixed = _starter(self._run, self._function, self._metadata)
        first = (*fixed, *(tensor.data_ptr() for tensor in before))
        middle = tuple(None if tensor is None else tensor.data_ptr() for tensor in between)
        last = (*(tensor.data_ptr() for tensor in after), *numbers, *self._constants)
        x_grid, y_grid, z_grid = grid
        empty = allocation(shape, dtype)

        def call(x: Tensor, _kept: Any = after) -> Tensor | None:
            address = x.data_ptr()
            if address % ALIGNMENT:
                return None
            out = empty(x)
            run(x_grid, y_grid, z_grid, stream(index), *first, address, *middle, out.data_ptr(), *last)
            return out

        return call

    def bound(
        self,
        grid: tuple[int, int, int],
        index: int,
        before: tuple[Tensor | None, ...] = (),
        numbers: tuple[float, ...] = (),
    ) -> Callable[..., None] | None:
        """A function of the addresses that change from call to call; None before :meth:`ordinary` ran.

        Args:
            grid: Programs.
            index: Of the device, which is current when the result is called; launches go to its current stream.
            before: What the kernel takes before those addresses.
            numbers: What it takes after them.
        """
        if self._run is None:
            return None
        stream = torch._C._cuda_getCurrentRawStream  # pyright: ignore[reportPrivateUsage]
        run, fixed = _starter(self._run, self._function, self._metadata)
        first = (*fixed, *(None if tensor is None else tensor.data_ptr() for tensor in before))
        last = (*numbers, *self._constants)
        x_grid, y_grid, z_grid = grid

        def launch(*addresses: int | None) -> None:
            run(x_grid, y_grid, z_grid, stream(index), *first, *addresses, *last)

        return launch
