"""Products with quantized weights that pass gradients to their activations."""

from halfbyte.autograd.matmul_4bit import MatMul4Bit, matmul_4bit

__all__ = ["MatMul4Bit", "matmul_4bit"]
