"""Writing safetensors files all or nothing: a save that fails leaves the file as it was."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.errors import CheckpointError

__all__ = ["write"]


def write(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` to ``path``: into a new file beside it, down to the disk, then in its place.

    Args:
        tensors: By name. Those that share memory are written one after another, as if they did not.
        path: The file; its folder must exist.
        metadata: Header entries; ``format: pt``, which transformers asks for, is always there.

    Raises:
        CheckpointError: A tensor without values, or a disk that does not take them. ``path`` is as it was.
    """
    path = Path(path)
    ghosts = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if ghosts:
        raise CheckpointError(f"{ghosts[0]} is on the meta device", expected="tensors with values")
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with fresh.open("xb") as created:
            mode = os.fstat(created.fileno()).st_mode & 0o777  # what this user's new files get
        save_file(_apart(tensors), fresh, {"format": "pt", **(metadata or {})})
        fresh.chmod(path.stat().st_mode & 0o777 if path.exists() else mode)
        _to_disk(fresh)
        fresh.replace(path)
        _to_disk(path.parent)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} could not be written ({error})", hint="free space on the disk, or choose another folder"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors no two of which share memory."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        start = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone().contiguous() if start in seen else tensor.contiguous()
        seen.add(start)
    return apart


def _to_disk(path: Path) -> None:
    """Wait until the disk has it. Folders can be waited for on POSIX only."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
