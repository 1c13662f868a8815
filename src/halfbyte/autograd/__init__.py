"""Products with quantized weights that pass gradients to their activations."""

from halfbyte.autograd.matmul_4bit import MatMul4Bit, matmul_4bit
from halfbyte.autograd.matmul_8bit import MatMul8bitFp, MatMul8bitLt, MatmulLtState, matmul
from halfbyte.autograd.outlier_pool import GlobalOutlierPooler

__all__ = [
    "GlobalOutlierPooler",
    "MatMul4Bit",
    "MatMul8bitFp",
    "MatMul8bitLt",
    "MatmulLtState",
    "matmul",
    "matmul_4bit",
]
