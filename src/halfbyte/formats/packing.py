"""The k-bit stream: codes one after another, most significant bit first.

At k = 4 this is bitsandbytes' nibble order (even element in the high half of the byte). The functions use only
operators and ``reshape``, so they take numpy arrays and torch tensors of any integer dtype alike.
"""

from __future__ import annotations

from typing import Any

__all__ = ["pack", "unpack"]

GROUP = 8
"""Codes packed together: 8 codes of k bits are k whole bytes for every k."""


def pack(codes: Any, bits: int) -> list[Any]:
    """Byte columns of packed codes.

    Args:
        codes: Integers below ``2**bits``, shape ``(groups, 8)``, in a 64-bit dtype when ``bits > 4``.
        bits: 1 to 7.

    Returns:
        ``bits`` arrays of shape ``(groups,)``: byte 0, byte 1, ... of each group. Stack them along the last axis.

    >>> import numpy as np
    >>> [int(b[0]) for b in pack(np.array([[1, 2, 3, 4, 5, 6, 7, 8]]), 4)] == [0x12, 0x34, 0x56, 0x78]
    True
    """
    if bits == 4:
        return [(codes[:, 2 * i] << 4) | codes[:, 2 * i + 1] for i in range(4)]
    word = codes[:, 0]
    for i in range(1, GROUP):
        word = (word << bits) | codes[:, i]
    return [(word >> (8 * (bits - 1 - i))) & 0xFF for i in range(bits)]


def unpack(packed: Any, bits: int) -> list[Any]:
    """Code columns of packed bytes: the inverse of :func:`pack`.

    Args:
        packed: Bytes, shape ``(groups, bits)``, in a 64-bit dtype when ``bits`` is not 4.
        bits: 1 to 7.

    Returns:
        8 arrays of shape ``(groups,)``.

    >>> import numpy as np
    >>> [int(c[0]) for c in unpack(np.array([[0x12, 0x34, 0x56, 0x78]]), 4)]
    [1, 2, 3, 4, 5, 6, 7, 8]
    """
    mask = (1 << bits) - 1
    if bits == 4:
        return [(packed[:, i // 2] >> (4 * (1 - i % 2))) & mask for i in range(GROUP)]
    word = packed[:, 0]
    for i in range(1, bits):
        word = (word << 8) | packed[:, i]
    return [(word >> (bits * (GROUP - 1 - i))) & mask for i in range(GROUP)]
