"""GPU kernels: Gluon where tensor cores are fed from registers (NVIDIA, sm_80 and later), plain Triton everywhere
else."""

from halfbyte.backends.triton import blockwise, dequantize, embedding, gemm, grouped, int8, optimizer, quantize
from halfbyte.backends.triton.ahead import warmup

__all__ = ["blockwise", "dequantize", "embedding", "gemm", "grouped", "int8", "optimizer", "quantize", "warmup"]
