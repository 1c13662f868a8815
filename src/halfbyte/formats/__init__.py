"""What the bits mean: codebooks, packing, blocks. Pure data and integer arithmetic; no device, no kernels, no torch."""

from halfbyte.formats import af4, dynamic, fp4, fp8, linear, nf4, normal
from halfbyte.formats.blocks import (
    BLOCKSIZES_4BIT,
    DEFAULT_BLOCKSIZE_4BIT,
    DEFAULT_BLOCKSIZE_8BIT,
    NESTED_BLOCKSIZE,
    block_count,
    packed_bytes,
)
from halfbyte.formats.codebook import Codebook, codebook, codebook_names, register
from halfbyte.formats.packing import pack, unpack

__all__ = [
    "BLOCKSIZES_4BIT",
    "DEFAULT_BLOCKSIZE_4BIT",
    "DEFAULT_BLOCKSIZE_8BIT",
    "NESTED_BLOCKSIZE",
    "Codebook",
    "af4",
    "block_count",
    "codebook",
    "codebook_names",
    "dynamic",
    "fp4",
    "fp8",
    "linear",
    "nf4",
    "normal",
    "pack",
    "packed_bytes",
    "register",
    "unpack",
]
