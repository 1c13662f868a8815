"""Fast CPU ops without a compiler on the user's machine: kernels written as LLVM IR and compiled at first use."""

from halfbyte.backends.cpu import blockwise, embedding, four_bit, grouped, int8, matmul, optimizer
from halfbyte.backends.cpu.ahead import warmup

__all__ = ["blockwise", "embedding", "four_bit", "grouped", "int8", "matmul", "optimizer", "warmup"]
