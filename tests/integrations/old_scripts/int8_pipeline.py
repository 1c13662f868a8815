"""The int8 product by hand, in the layouts of GPUs of that time."""
# error: hint: use functional.int8_double_quant(A, threshold=...), whose last result are columns, not a COO tensor

import bitsandbytes.functional as F
import torch
from bitsandbytes.functional import double_quant, igemmlt, mm_dequant, transform

A, B = torch.randn(16, 64).half(), torch.randn(32, 64).half()
CA, CAt, SCA, SCAt, outliers = double_quant(A)
C32A, SA = transform(CA, "col32")
CB, SCB = F.vectorwise_quant(B)
out32, Sout32 = igemmlt(C32A, CB, SA, SCB)
print(mm_dequant(out32, Sout32, SCA, SCB))
