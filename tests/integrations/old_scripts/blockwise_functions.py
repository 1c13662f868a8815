"""Tensors by bitsandbytes.functional: 8-bit blocks, code maps, quantiles, one scale for all."""

import bitsandbytes.functional as F
import torch

torch.manual_seed(0)
A = torch.randn(1024, 1024)
C, S = F.quantize_blockwise(A)
B = F.dequantize_blockwise(C, S)
assert (A - B).abs().mean() < 0.011
assert ((A - B).abs() / (A.abs() + 1e-8)).mean() < 0.02
code = F.create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)
assert code.shape == (256,)
assert bool((code.diff() >= 0).all())
C, S = F.quantize_blockwise(A, code=F.create_linear_map(), blocksize=256, nested=False)
assert (F.dequantize_blockwise(C, S, blocksize=256) - A).abs().max() < 0.02
for code in (F.create_fp8_map(), F.create_normal_map(), F.create_quantile_map(A)):
    assert code.shape == (256,)
C, S = F.quantize_blockwise(A, code=F.create_quantile_map(A).to(A.device))
assert (F.dequantize_blockwise(C, S) - A).abs().mean() < 0.03
C, S = F.quantize(A)
assert (F.dequantize(C, S) - A).abs().mean() < 0.05
assert F.estimate_quantiles(A).diff().min() >= 0
gnorm = torch.zeros(100)
norm, clip, scale = F.percentile_clipping(A, gnorm, 1, percentile=5)
assert abs(norm / A.norm() - 1) < 1e-4
assert scale == 1.0
print("right")
