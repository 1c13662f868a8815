"""Parameters that are spread over processes (FSDP2's DTensor): their local part, and blocks of the logical tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.formats import blocks

__all__ = ["gather_absmax", "is_sharded", "local", "local_blocks", "localize", "total", "zeros_like"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; does not import torch.distributed."""
    return hasattr(tensor, "_local_tensor")


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this process holds: all of an ordinary tensor."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # pyright: ignore


def local_blocks(p: Tensor, blocksize: int) -> int:
    """Blocks of the logical tensor that this process holds at least one value of."""
    return blocks.block_count(p.numel(), blocksize)


def zeros_like(p: Tensor, dtype: torch.dtype, parts: int) -> Tensor:
    """Zeros of ``p``'s shape, spread as ``p`` is, row-major; ``parts`` of them stacked, if not 0."""
    shape = (parts, *p.shape) if parts else tuple(p.shape)
    return torch.zeros(shape, dtype=dtype, device=p.device)


def gather_absmax(absmax: Tensor, p: Tensor) -> Tensor:
    """The scales of the logical tensor's blocks, the same in every process."""
    del p
    return absmax


def localize(entries: dict[str, Any], p: Tensor) -> None:
    """Cut a loaded state of the logical tensor down to what this process holds of ``p``, in place."""
    del entries, p


def total(sums: Tensor, p: Tensor) -> Tensor:
    """Sums over the whole logical tensor, from those over each process's part."""
    del p
    return sums
