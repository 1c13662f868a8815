"""Block sizes, counts and nesting parameters: the only copy."""

from __future__ import annotations

from halfbyte.errors import ArgumentError

__all__ = [
    "BLOCKSIZES_4BIT",
    "DEFAULT_BLOCKSIZE_4BIT",
    "DEFAULT_BLOCKSIZE_8BIT",
    "NESTED_BLOCKSIZE",
    "block_count",
    "check_blocksize_4bit",
    "check_blocksize_8bit",
    "packed_bytes",
    "packed_rows",
]

BLOCKSIZES_4BIT = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BLOCKSIZE_4BIT = 64
DEFAULT_BLOCKSIZE_8BIT = 4096
NESTED_BLOCKSIZE = 256
"""Values of absmax that share one second-level absmax under double quantization."""


def block_count(numel: int, blocksize: int) -> int:
    """Blocks that ``numel`` elements take; the last one may be short.

    >>> block_count(65, 64), block_count(0, 64)
    (2, 0)
    """
    return -(-numel // blocksize)


def packed_bytes(numel: int, bits: int = 4) -> int:
    """Bytes that ``numel`` codes of ``bits`` bits take.

    >>> packed_bytes(5), packed_bytes(8, bits=3)
    (3, 3)
    """
    return -(-numel * bits // 8)


def packed_rows(numel: int, itemsize: int) -> int:
    """Rows of the ``(rows, 1)`` tensor that holds ``numel`` 4-bit codes in a storage dtype of ``itemsize`` bytes.

    Raises:
        ArgumentError: The bytes do not fill whole elements of the storage dtype.

    >>> packed_rows(64, 2)
    16
    """
    nbytes = packed_bytes(numel)
    if nbytes % itemsize:
        raise ArgumentError(
            f"{numel} values take {nbytes} bytes, which is no whole number of {itemsize}-byte storage elements",
            expected=f"a multiple of {itemsize} bytes",
            hint="use quant_storage=torch.uint8",
        )
    return nbytes // itemsize


def check_blocksize_4bit(blocksize: int) -> int:
    """``blocksize`` itself if 4-bit formats have it.

    Raises:
        ArgumentError: They do not.
    """
    if blocksize not in BLOCKSIZES_4BIT:
        raise ArgumentError(
            f"blocksize is {blocksize!r}",
            expected=f"one of {', '.join(map(str, BLOCKSIZES_4BIT))}",
            hint=f"leave it unset for {DEFAULT_BLOCKSIZE_4BIT}",
        )
    return blocksize


def check_blocksize_8bit(blocksize: int) -> int:
    """``blocksize`` itself if it is a positive whole number.

    Raises:
        ArgumentError: It is not.
    """
    if blocksize < 1:
        raise ArgumentError(f"blocksize is {blocksize!r}", expected="1 or more", hint="use 256 or 4096")
    return blocksize
