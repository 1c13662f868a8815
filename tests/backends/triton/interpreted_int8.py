"""Child of test_int8: runs the int8 kernels on CPU tensors under Triton's interpreter, prints mismatches as JSON."""

import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))

import torch

import halfbyte.backends.registry  # noqa: F401  (binds the ops)
from halfbyte.backends.reference import int8 as reference
from halfbyte.backends.triton.kernels.int8 import _int8_dequantize_kernel, _int8_gather_kernel, _int8_rows_kernel
from halfbyte.backends.triton.kernels.int8_product import _int8_product_kernel
from halfbyte.backends.triton.kernels.int8_row import _int8_row_kernel
from halfbyte.formats.int8 import STEP

wrong = defaultdict(list)
torch.manual_seed(2)
THRESHOLD = 6.0
CAPACITY = 16


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


def rows_of(x, threshold, shared):
    m, k = x.shape
    codes, absmax = torch.full((m, k), 99, dtype=torch.int8), torch.full((m,), float("nan"))
    words = torch.zeros((1 if shared else m, -(-k // 32)), dtype=torch.int32)
    _int8_rows_kernel[(m,)](x, codes, absmax, words, threshold, k, x.stride(0), threshold > 0, shared, 64)
    return codes, absmax, words


def listed(words, k):
    bits = (words[:, :, None] >> torch.arange(32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :k].bool()


def check_gather(words, x, weight):
    (m, k), n = x.shape, len(weight)
    a, b = torch.full((m, CAPACITY), 77.0).to(x.dtype), torch.full((n, CAPACITY), 77.0).to(x.dtype)
    count = torch.full((1,), -1, dtype=torch.int32)
    _int8_gather_kernel[(-(-m // 8) + -(-n // 8),)](
        words, x, weight, a, b, count, THRESHOLD, m, n, k, x.stride(0), CAPACITY, 8, 8, 4
    )
    columns = listed(words, k)[0].nonzero().view(-1)[:CAPACITY]
    part = x[:, columns]
    want = part.masked_fill(~(part.abs() >= THRESHOLD), 0)
    expect("gather", torch.equal(a[:, : len(columns)], want), "activation", m, n, k)
    expect("gather", torch.equal(b[:, : len(columns)], weight[:, columns].to(x.dtype)), "weight", m, n, k)
    used = -(-len(columns) // 4) * 4
    expect("gather", not a[:, len(columns) : used].any() and not b[:, len(columns) : used].any(), "rest", m, n, k)
    expect("gather", int(count) == int(listed(words, k).sum()), "count", m, n, k)
    return a, b, count


def product(codes, weight, dtype, bias, scales, outliers, full, apart=None):
    (m, k), n = codes.shape, weight.shape[0]
    out = torch.full((m, n), -1 if dtype == torch.int32 else float("nan"), dtype=dtype)
    x, words = outliers or (None, None)
    a, b, count = apart or (None, None, None)
    grid = (-(-m // 16) * -(-n // 32),)
    _int8_product_kernel[grid](
        codes, weight, out, bias, *scales, x, full, words, a, b, count, THRESHOLD, m, n, k,
        k if x is None else x.stride(0), STEP, 16, 32, 32, 4, 2, k % 32 == 0, CAPACITY if apart else 0,
        8 if apart else 2, dtype == torch.int32, outliers is not None, full is not None, bias is not None,
    )  # fmt: skip
    return out


def row(x, weight, SCB, threshold, bias):
    (_, k), n = x.shape, weight.shape[0]
    out = torch.full((1, n), float("nan"), dtype=x.dtype)
    words, programs = 64, 2
    planes = 4 if x.dtype == torch.float32 else 3
    _int8_row_kernel[(programs,)](
        x, weight.view(torch.int32), bias, SCB, out, threshold, n, k // 4, STEP, 8, words, planes, False,
        k == 4 * words, threshold > 0, bias is not None, programs,
    )  # fmt: skip
    return out


def close(a, b):
    return torch.allclose(a.float(), b.float(), rtol=2e-3, atol=2e-2, equal_nan=True)


for n, k, first, columns in ((40, 96, 0, 96), (21, 65, 7, 30)):
    weight, SCB = torch.randint(-127, 128, (n, k)).to(torch.int8), torch.rand(n)
    found = torch.full((n, columns), float("nan"))
    _int8_dequantize_kernel[(-(-n // 16), -(-columns // 32))](weight, SCB, found, n, k, first, columns, STEP, 16, 32)
    want = reference.int8_vectorwise_dequant(weight, SCB)[:, first : first + columns]
    expect("dequantize", torch.allclose(found, want, rtol=1e-6), n, k, first, columns)

for m, n, k in ((1, 40, 96), (4, 21, 256), (5, 33, 65), (20, 70, 130)):
    weight = torch.randint(-127, 128, (n, k)).to(torch.int8)
    SCB, bias = torch.rand(n), torch.randn(n)
    for dtype in (torch.float32, torch.float16):  # the interpreter truncates to bf16
        for threshold in (0.0, THRESHOLD):
            x = activations(m, k, dtype)
            what = (m, n, k, dtype, threshold)
            codes, absmax, own = rows_of(x, threshold, False)
            again, _, shared = rows_of(x, threshold, True)
            values, outliers = reference._split(x, threshold)
            want_codes, want_absmax = reference.quantize_rows(values)
            expect("rows", torch.equal(codes, want_codes) and same(absmax, want_absmax), *what)
            if outliers is not None:
                expect("rows", torch.equal(listed(own, k), outliers) and torch.equal(again, codes), *what)
                expect("rows", torch.equal(listed(shared, k)[0], outliers.any(0)), *what)
            sums = product(codes, weight, torch.int32, None, (None, None), None, None)
            expect("sums", torch.equal(sums, reference.int8_linear_matmul(codes, weight)), m, n, k)
            apart = check_gather(shared, x, weight) if threshold and k <= 256 else None
            for full in (None, (weight * SCB[:, None] / 100).to(dtype)) if threshold else (None,):
                for given in (None, bias):
                    want = reference.int8_linear(x, weight, SCB, threshold, given, full)
                    got = product(codes, weight, dtype, given, (absmax, SCB), (x, own) if threshold else None, full)
                    expect("product", close(got, want), *what, full is not None)
                    if apart is not None and full is None:
                        got = product(codes, weight, dtype, given, (absmax, SCB), (x, shared), None, apart)
                        expect("product", close(got, want), "apart", *what)
                    if full is None and k % 16 == 0:
                        expect("row", close(row(x[:1], weight, SCB, threshold, given), want[:1]), *what)

for value in (float("inf"), float("-inf"), float("nan"), 6e4, 0.0):
    weight, SCB = torch.randint(1, 128, (21, 64)).to(torch.int8), torch.rand(21)
    for dtype in (torch.float32, torch.float16):
        x = activations(1, 64, dtype) if value else torch.zeros(1, 64, dtype=dtype)
        x[0, 7] = value
        want = reference.int8_linear(x, weight, SCB, THRESHOLD)
        expect("row", close(row(x, weight, SCB, THRESHOLD, None), want), value, dtype)

for threshold in (0.0, THRESHOLD):
    weight, SCB = torch.randint(1, 128, (21, 64)).to(torch.int8), torch.rand(21) * 1e-3
    x = activations(9, 64, torch.float32)
    x[0, 7:9], x[4, 2], x[5] = 3e38, -3e38, 1e36
    finite = torch.tensor([number != 3 for number in range(9)])  # row 3 holds a NaN
    codes, absmax, own = rows_of(x, threshold, False)
    again, again_absmax, shared = rows_of(x, threshold, True)
    ways = {
        "row": row(x[:1], weight, SCB, threshold, None),
        "product": product(codes, weight, torch.float32, None, (absmax, SCB), (x, own) if threshold else None, None),
    }
    if threshold:
        gathered = check_gather(shared, x, weight)
        ways["gathered"] = product(again, weight, x.dtype, None, (again_absmax, SCB), (x, shared), None, gathered)
    apart = x.double().masked_fill(x.abs() < threshold, 0.0) if threshold else 0.0
    values = codes.double() * absmax.double().abs()[:, None] / 127 + apart
    exact = values @ reference.int8_vectorwise_dequant(weight, SCB).double().t()
    for name, got in ways.items():
        rows = finite[: len(got)]
        off, size = (got.double() - exact[: len(got)]).abs()[rows], exact[: len(got)].abs().amax(1, keepdim=True)[rows]
        expect("huge", bool((off <= 1e-5 * size + 1e-44).all()), name, threshold)

print(json.dumps(wrong))
