"""int8 weights of old checkpoints, stored in the order that one GPU generation multiplied them in, back to rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.formats import int8

__all__ = ["maybe_rearrange_weight", "to_rows", "weight_format_name"]

_COLUMN_TILE = 32


def weight_format_name(stored: Tensor | int | str) -> str:
    """Name of the layout that a checkpoint's ``weight_format`` means.

    Raises:
        CheckpointError: There is no such layout.

    >>> weight_format_name(2)
    'col_turing'
    """
    value = stored.item() if isinstance(stored, Tensor) else stored
    if isinstance(value, int) and 0 <= value < len(int8.WEIGHT_FORMATS):
        return int8.WEIGHT_FORMATS[value]
    if value in int8.WEIGHT_FORMATS:
        return str(value)
    known = ", ".join(f"{number} ({name})" for number, name in enumerate(int8.WEIGHT_FORMATS))
    raise CheckpointError(f"weight_format is {value!r}", expected=known)


def to_rows(weight: Tensor, weight_format: str, shape: tuple[int, int]) -> Tensor:
    """The weight of ``shape`` in row-major order, contiguous.

    Args:
        weight: int8 codes as stored; layouts other than ``row`` are padded to whole tiles.
        weight_format: A name in :data:`halfbyte.formats.int8.WEIGHT_FORMATS`.
        shape: (output features, input features).

    Raises:
        CheckpointError: The number of codes does not fit.
    """
    layout = int8.LAYOUTS.get(weight_format)
    if layout is None:
        if tuple(weight.shape) != shape:
            raise CheckpointError(f"an int8 weight of shape {tuple(weight.shape)}", expected=f"{shape}")
        return weight.contiguous()
    row_tiles, column_tiles = -(-shape[0] // layout.row_tile), -(-shape[1] // _COLUMN_TILE)
    if weight.numel() != row_tiles * column_tiles * layout.row_tile * _COLUMN_TILE:
        raise CheckpointError(
            f"a {weight_format} weight of {weight.numel()} codes",
            expected=f"{row_tiles * column_tiles} tiles of {layout.row_tile} x {_COLUMN_TILE} for shape {shape}",
        )
    # Memory order is (column tile, row tile, digits within the tile); digits count from axis 2.
    tiles = weight.contiguous().view(column_tiles, row_tiles, *layout.memory)
    order = [1, *(2 + digit for digit in layout.rows), 0, *(2 + digit for digit in layout.columns)]
    rows = tiles.permute(order).reshape(row_tiles * layout.row_tile, column_tiles * _COLUMN_TILE)
    return rows[: shape[0], : shape[1]].contiguous()


def maybe_rearrange_weight(
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: object,  # noqa: ARG001 - torch calls its hooks with all of these, by position
    strict: bool,  # noqa: ARG001
    missing_keys: object,  # noqa: ARG001
    unexpected_keys: object,  # noqa: ARG001
    error_msgs: object,  # noqa: ARG001
) -> None:
    """Put a state dict's int8 weight into rows, in place, and drop its ``weight_format``.

    :class:`halfbyte.nn.Linear8bitLt` does this by itself; pickled layers of bitsandbytes name it as their hook. It
    knows no layer: a weight whose columns were padded to a multiple of 32 keeps the padding.

    Raises:
        CheckpointError: No such layout, or a weight that does not fill it.

    >>> state = {"weight": torch.arange(64).view(2, 32).to(torch.int8), "weight_format": 1}
    >>> maybe_rearrange_weight(state, "", {}, True, [], [], [])
    >>> list(state), state["weight"][1, 0].item()
    (['weight'], 32)
    """
    weight = state_dict.get(f"{prefix}weight")
    if weight is None:
        return
    name = weight_format_name(state_dict.pop(f"{prefix}weight_format", "row"))
    if name == "row" or weight.dtype != torch.int8:
        return
    scales = state_dict.get(f"{prefix}SCB")
    rows = weight.shape[0] if scales is None else scales.numel()
    state_dict[f"{prefix}weight"] = to_rows(weight, name, (rows, weight.shape[1]))
