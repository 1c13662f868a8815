"""Parameters that are spread over processes (FSDP2's DTensor): their local part, and blocks of the logical tensor.

A state's blocks are those of the whole parameter in row-major order, however it is cut: the same bytes on 1, 2 or 4
processes. A process holds a run of rows, so that at most its first and last block are shared with others; these it
updates apart (:mod:`halfbyte.optim.edges`), and their scales are agreed on by one small all-reduce a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.errors import UnsupportedError
from halfbyte.formats import blocks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Part",
    "decode",
    "gather_absmax",
    "is_sharded",
    "local",
    "local_blocks",
    "localize",
    "part_of",
    "total",
    "zeros_like",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; does not import torch.distributed."""
    return hasattr(tensor, "_local_tensor")


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this process holds: all of an ordinary tensor."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # pyright: ignore


@dataclass(frozen=True)
class Part:
    """Which values of a parameter this process holds.

    Attributes:
        starts: First value of each process, and the number of values behind the last one.
        rank: This process.
        group: The processes; None where all is here.
    """

    starts: tuple[int, ...]
    rank: int = 0
    group: ProcessGroup | None = None

    @property
    def start(self) -> int:
        """First value that is here."""
        return self.starts[self.rank]

    @property
    def stop(self) -> int:
        """First value that is not here any more."""
        return self.starts[self.rank + 1]

    def blocks(self, blocksize: int) -> tuple[int, int]:
        """First block that this process holds values of, and the one behind the last."""
        if self.start == self.stop:
            return 0, 0
        return self.start // blocksize, blocks.block_count(self.stop, blocksize)

    def shared(self, blocksize: int) -> list[int]:
        """Blocks that several processes hold values of, rising.

        >>> Part((0, 300, 600, 900)).shared(256)
        [1, 2]
        """
        inner = {start for start in self.starts[1:-1] if start % blocksize and start < self.starts[-1]}
        return sorted({start // blocksize for start in inner})


def part_of(p: Tensor) -> Part:
    """What this process holds of ``p``.

    Raises:
        UnsupportedError: It is not cut into runs of rows.
    """
    if not is_sharded(p):
        return Part((0, p.numel()))
    from torch.distributed.tensor import Replicate, Shard

    placements, mesh = p.placements, p.device_mesh  # pyright: ignore
    cut = [dim for dim, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if not cut:
        return Part((0, p.numel()))
    if len(cut) > 1 or type(placements[cut[0]]) is not Shard or placements[cut[0]].dim != 0:
        raise UnsupportedError(
            f"a parameter of shape {tuple(p.shape)} placed as {placements}",
            expected="one Shard(0), as fully_shard places it, and Replicate",
        )
    size, rows = mesh.size(cut[0]), p.shape[0]
    each = -(-rows // size)
    width = p.numel() // rows if rows else 0
    starts = (*(min(index * each, rows) * width for index in range(size)), p.numel())
    return Part(starts, mesh.get_local_rank(cut[0]), mesh.get_group(cut[0]))


def local_blocks(p: Tensor, blocksize: int) -> int:
    """Blocks of the logical tensor that this process holds at least one value of."""
    first, last = part_of(p).blocks(blocksize)
    return last - first


def _spread_as(value: Tensor, p: Any, parts: int) -> Tensor:
    """A DTensor of ``p``'s logical shape (behind ``parts``), whose local part is ``value``."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((parts, *p.shape) if parts else p.shape)
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    placements = [
        Shard(one.dim + bool(parts)) if isinstance(one, Shard) else one  # pyright: ignore
        for one in p.placements
    ]
    return DTensor.from_local(value, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def zeros_like(p: Tensor, dtype: torch.dtype, parts: int) -> Tensor:
    """Zeros of ``p``'s shape, spread as ``p`` is, row-major; ``parts`` of them stacked, if not 0."""
    here = tuple(local(p).shape)
    made = torch.zeros((parts, *here) if parts else here, dtype=dtype, device=p.device)
    return _spread_as(made, p, parts) if is_sharded(p) else made


def gather_absmax(absmax: Tensor, p: Tensor, blocksize: int) -> Tensor:
    """The scales of the logical tensor's blocks, the same in every process."""
    part = part_of(p)
    if part.group is None:
        return absmax
    first, last = part.blocks(blocksize)
    count = blocks.block_count(p.numel(), blocksize)
    whole = torch.zeros((*absmax.shape[:-1], count), dtype=absmax.dtype, device=absmax.device)
    whole[..., first:last] = absmax
    return _reduced(whole, part, "MAX")


def _reduced(values: Tensor, part: Part, how: str) -> Tensor:
    if part.group is not None:
        import torch.distributed as dist

        dist.all_reduce(values, getattr(dist.ReduceOp, how), group=part.group)
    return values


def agreed(values: Tensor, part: Part) -> Tensor:
    """The largest of every value over the processes, in place."""
    return _reduced(values, part, "MAX")


def total(sums: Tensor, p: Tensor) -> Tensor:
    """Sums over the whole logical tensor, from those over each process's part; in place."""
    return _reduced(sums, part_of(p), "SUM")


def localize(entries: dict[str, Any], p: Tensor, blocksize: int) -> None:
    """Cut a loaded state of the logical tensor down to what this process holds of ``p``, in place.

    Args:
        entries: ``state1``, ``absmax1``, ... whole, or sharded as ``p`` is (scales always whole).
        p: The parameter.
        blocksize: Of the 8-bit states; 0 for fp32 ones.
    """
    part = part_of(p)
    first, last = part.blocks(blocksize) if blocksize else (0, 0)
    for key, value in entries.items():
        if key in {"state1", "state2"}:
            entries[key] = _localized(value, p, part)
        elif key in {"absmax1", "absmax2"} and part.group is not None:
            entries[key] = value[..., first:last].contiguous()


def _localized(value: Tensor, p: Tensor, part: Part) -> Tensor:
    if not is_sharded(p):
        return value.full_tensor() if is_sharded(value) else value  # pyright: ignore
    parts = value.shape[0] if value.dim() > p.dim() else 0
    if is_sharded(value):
        return value.redistribute(p.device_mesh, _spread_as(local(value), p, parts).placements)  # pyright: ignore
    here = local(p).shape
    flat = value.reshape(max(parts, 1), -1)[:, part.start : part.stop]
    return _spread_as(flat.reshape((parts, *here) if parts else here).contiguous(), p, parts)


def decode(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, p: Tensor) -> Tensor:
    """fp32 values of the codes that this process holds, flat: its first block may have begun elsewhere."""
    before = part_of(p).start % blocksize
    flat = torch.nn.functional.pad(codes.reshape(-1), (before, 0))
    return torch.ops.halfbyte.dequantize_blockwise(flat, absmax, code, blocksize, torch.float32)[before:]
