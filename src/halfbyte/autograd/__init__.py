"""Products with quantized weights that pass gradients to their activations."""

from halfbyte.autograd.grouped_4bit import GroupedMatMul4Bit, group_rows, grouped_matmul_4bit
from halfbyte.autograd.matmul_4bit import MatMul4Bit, matmul_4bit
from halfbyte.autograd.matmul_8bit import MatMul8bitLt, MatmulLtState, matmul

__all__ = [
    "GroupedMatMul4Bit",
    "MatMul4Bit",
    "MatMul8bitLt",
    "MatmulLtState",
    "group_rows",
    "grouped_matmul_4bit",
    "matmul",
    "matmul_4bit",
]
