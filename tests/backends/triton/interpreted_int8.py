"""Child of test_int8: runs the int8 kernels on CPU tensors under Triton's interpreter, prints mismatches as JSON."""

import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))

import torch

import halfbyte.backends.registry  # noqa: F401  (binds the ops)
from halfbyte.backends.reference import int8 as reference
from halfbyte.backends.triton.kernels.int8 import _int8_columns_kernel, _int8_product_kernel, _int8_rows_kernel
from halfbyte.formats.int8 import STEP, STEP_SQUARED

wrong = defaultdict(list)
torch.manual_seed(2)
THRESHOLD = 6.0


def same(a, b):
    return torch.equal(torch.nan_to_num(a.float(), nan=7.0), torch.nan_to_num(b.float(), nan=7.0))


def expect(case, ok, *what):
    wrong[case]
    if not ok:
        wrong[case].append(" ".join(map(str, what)))


def activations(m, k, dtype):
    x = torch.randn(m, k) * 2
    x[torch.rand(m, k) < 0.04] *= 8
    if m > 3:
        x[1] = 0.0
        x[2] *= 1e-38
        x[3, :1] = float("nan")
    x[0, 0] = THRESHOLD
    return x.to(dtype)


def rows_of(x, threshold):
    m, k = x.shape
    codes, absmax = torch.full((m, k), 99, dtype=torch.int8), torch.full((m,), float("nan"))
    flags = torch.zeros(k, dtype=torch.int32)
    _int8_rows_kernel[(m,)](x, codes, absmax, flags, threshold, k, x.stride(0), threshold > 0, 64)
    columns, count = torch.full((k,), -1, dtype=torch.int32), torch.full((1,), -1, dtype=torch.int32)
    _int8_columns_kernel[(1,)](flags, columns, count, k, 64)
    return codes, absmax, columns, count


def product(codes, weight, dtype, bias, scales, outliers, full):
    (m, k), n = codes.shape, weight.shape[0]
    out = torch.full((m, n), -1 if dtype == torch.int32 else float("nan"), dtype=dtype)
    x, columns, count, threshold = outliers or (None, None, None, 0.0)
    grid = (-(-m // 16) * -(-n // 32),)
    _int8_product_kernel[grid](
        codes, weight, out, bias, *scales, x, full, columns, count, threshold, m, n, k, k if x is None else x.stride(0),
        STEP, STEP_SQUARED, 16, 32, 32, 16, 2, dtype == torch.int32, outliers is not None, full is not None,
        bias is not None,
    )  # fmt: skip
    return out


for m, n, k in ((1, 40, 96), (5, 33, 65), (20, 70, 130)):
    weight = torch.randint(-127, 128, (n, k)).to(torch.int8)
    SCB, bias = torch.rand(n), torch.randn(n)
    for dtype in (torch.float32, torch.float16):  # the interpreter truncates to bf16
        for threshold in (0.0, THRESHOLD):
            x = activations(m, k, dtype)
            codes, absmax, columns, count = rows_of(x, threshold)
            values, outliers = reference._split(x, threshold)
            want_codes, want_absmax = reference.quantize_rows(values)
            expect("rows", torch.equal(codes, want_codes) and same(absmax, want_absmax), m, k, dtype, threshold)
            found = columns[: int(count)].tolist()
            listed = [] if outliers is None else outliers.any(0).nonzero().view(-1).tolist()
            expect("columns", found == listed, m, k, dtype, threshold)
            sums = product(codes, weight, torch.int32, None, (None, None), None, None)
            expect("sums", torch.equal(sums, reference.int8_linear_matmul(codes, weight)), m, n, k)
            for full in (None, (weight * SCB[:, None] / 100).to(dtype)):
                for given in (None, bias):
                    want = reference.int8_linear(x, weight, SCB, threshold, given, full)
                    scales = (absmax, SCB)
                    extra = (x, columns, count, threshold) if threshold else None
                    got = product(codes, weight, dtype, given, scales, extra, full if threshold else None)
                    close = torch.allclose(got.float(), want.float(), rtol=2e-3, atol=2e-2, equal_nan=True)
                    expect("product", close, m, n, k, dtype, threshold, full is not None)

print(json.dumps(wrong))
