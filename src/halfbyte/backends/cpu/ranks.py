"""Tables of the codes of new states at fixed addresses."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from halfbyte.backends.cpu.tables import Table
from halfbyte.formats import ranks as formats
from halfbyte.rules import encoding_map

__all__ = ["Ranks", "ranks"]


@dataclass(frozen=True)
class Ranks:
    """As :class:`halfbyte.formats.ranks.Ranks`, with the table where kernels find it."""

    table: Table
    shift: int
    signed: bool


@functools.lru_cache(maxsize=64)
def ranks(code: bytes) -> Ranks | str:
    """How states are encoded in a map of 256 rising fp32 values, given as bytes; a reason if there is no table."""
    found = formats.ranks(encoding_map(np.frombuffer(code, np.float32)).tobytes())
    if isinstance(found, str):
        return found
    return Ranks(Table.of(found.table.view(np.uint8)), found.shift, found.signed)
