"""How many threads share a call, and whose: torch's own OpenMP threads where they can be borrowed, else a small pool.

Borrowing matters. After each of its ops, torch's OpenMP threads spin for a while in wait of the next; a second pool
would have to share the cores with them. ``GOMP_parallel`` is the entry point by which compiled code starts an OpenMP
region (GNU libgomp's ABI, which LLVM's libomp also exports on Linux), and torch's library has put it into the process.
An OpenMP runtime does not survive ``fork`` once it has threads, so a forked child uses the pool.
"""

from __future__ import annotations

import ctypes
import functools
import os
import queue
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from halfbyte import _env
from halfbyte.errors import ArgumentError

__all__ = ["count", "run", "source"]

Function = Callable[[int], None]


@functools.lru_cache(maxsize=1)
def _override() -> int:
    wanted = int(_env.get("HALFBYTE_NUM_THREADS"))
    if wanted < 0:
        raise ArgumentError(f"HALFBYTE_NUM_THREADS={wanted}", expected="0 (follow torch) or more")
    return wanted


def count() -> int:
    """Threads that a call may use: HALFBYTE_NUM_THREADS (read once), else torch's number now.

    Raises:
        ArgumentError: HALFBYTE_NUM_THREADS is negative.
    """
    return _override() or torch.get_num_threads()


@functools.lru_cache(maxsize=1)
def _gomp() -> Any:
    if os.name != "posix" or "OpenMP" not in torch.__config__.parallel_info():
        return None
    region = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if region is not None:
        region.argtypes, region.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return region


_forked = False


def _after_fork() -> None:
    global _forked, _pool
    _forked, _pool = True, _Pool()


def source() -> str:
    """Whose threads serve: ``openmp`` or ``pool``."""
    return "pool" if _forked or _gomp() is None else "openmp"


class _Call:
    """One kernel call that threads may join until its caller has seen the last piece go."""

    def __init__(self, function: Function, block: int) -> None:
        self._function, self._block = function, block
        self._lock, self._left = threading.Lock(), threading.Event()
        self._closed, self._inside = False, 0

    def join(self) -> None:
        """Help, unless it is too late."""
        with self._lock:
            if self._closed:
                return
            self._inside += 1
        self._function(self._block)
        with self._lock:
            self._inside -= 1
            if self._closed and not self._inside:
                self._left.set()

    def run(self) -> None:
        """Work till no piece is left, then wait for those that joined; not for those that never came to it."""
        self._function(self._block)
        with self._lock:
            self._closed = True
            waiting = self._inside > 0
        if waiting:
            self._left.wait()


class _Pool:
    """Daemon threads that wait for kernels; started when needed, as many as were ever needed at once."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._started = 0
        self._lock = threading.Lock()

    def _work(self) -> None:
        while True:
            self._calls.get().join()

    def run(self, function: Function, block: int, threads: int) -> None:
        with self._lock:
            while self._started < threads - 1:
                self._started += 1
                threading.Thread(target=self._work, name=f"halfbyte-cpu-{self._started}", daemon=True).start()
        call = _Call(function, block)
        for _ in range(threads - 1):
            self._calls.put(call)
        call.run()


_pool = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Blocks(threading.local):
    """An argument block for each Python thread, as making one costs as much as a small call."""

    def __init__(self) -> None:
        self.block = (ctypes.c_int64 * BLOCK_WORDS)()
        self.address = ctypes.addressof(self.block)


BLOCK_WORDS = 64
_blocks = _Blocks()
_packed = {count: struct.Struct(f"={count}q").pack_into for count in range(BLOCK_WORDS)}


def run(address: int, function: Function, pieces: int, arguments: Sequence[int]) -> None:
    """Run a kernel over ``pieces`` pieces of work. The GIL is free meanwhile; calls from several threads are fine."""
    held = _blocks
    _packed[2 + len(arguments)](held.block, 0, 0, pieces, *arguments)
    threads = count()
    if threads > pieces:
        threads = pieces
    if threads <= 1:
        function(held.address)
    elif source() == "openmp":
        _gomp()(address, held.address, threads, 0)
    else:
        _pool.run(function, held.address, threads)
