"""Reads memory and does nothing else, by a kernel of its own: the time that no product with those bytes can beat."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from halfbyte.backends.cpu import compiler, host
from halfbyte.backends.cpu.call import Kernel
from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.ssa import Type

__all__ = ["read"]

STEP = 256


def read(tensors: Sequence[torch.Tensor]) -> None:
    """Read every byte of contiguous tensors (but a last piece of less than 256 bytes), on all threads."""
    for tensor in tensors:
        blocks = tensor.numel() * tensor.element_size() // STEP
        a_piece = max(1, blocks // 32)
        pieces = -(-blocks // a_piece)
        sums = torch.empty(pieces * 64, dtype=torch.uint8)
        _kernel()(pieces, tensor.data_ptr(), sums.data_ptr(), blocks, a_piece)


@functools.lru_cache(maxsize=1)
def _kernel() -> Kernel:
    name, level = f"read_{host.level().name}", host.level()
    return Kernel(*compiler.function(name, level, lambda: _text(name)))


def _text(name: str) -> str:
    e = Emitter(name, ("source", "out", "blocks", "a_piece"), typed_pointers=compiler.TYPED_POINTERS)
    source, out, blocks, a_piece = (e.argument(word) for word in ("source", "out", "blocks", "a_piece"))
    wide = Type("i64", 8)
    with e.pieces() as piece:
        start = piece * a_piece
        stop = e.least(start + a_piece, blocks)
        sums = [e.variable(wide, 0) for _ in range(4)]
        with e.loop(start, stop) as block:
            address = source + block * STEP
            e.prefetch(address + 2048)
            e.prefetch(address + 2112)
            e.prefetch(address + 2176)
            e.prefetch(address + 2240)
            for i, total in enumerate(sums):
                total.set(total.get() ^ e.load(wide, address + 64 * i))
        first, second, third, fourth = (total.get() for total in sums)
        e.store(first ^ second ^ third ^ fourth, out + (piece << 6))
    return e.finish()
