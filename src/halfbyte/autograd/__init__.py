"""Products with quantized weights that pass gradients to their activations."""

from halfbyte.autograd.low_rank_4bit import low_rank_matmul_4bit
from halfbyte.autograd.matmul_4bit import MatMul4Bit, gradient_4bit, matmul_4bit, repeated_matmul_4bit
from halfbyte.autograd.matmul_8bit import MatMul8bitFp, MatMul8bitLt, MatmulLtState, matmul
from halfbyte.autograd.outlier_pool import GlobalOutlierPooler

__all__ = [
    "GlobalOutlierPooler",
    "MatMul4Bit",
    "MatMul8bitFp",
    "MatMul8bitLt",
    "MatmulLtState",
    "gradient_4bit",
    "low_rank_matmul_4bit",
    "matmul",
    "matmul_4bit",
    "repeated_matmul_4bit",
]
