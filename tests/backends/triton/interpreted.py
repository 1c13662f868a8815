"""Child of test_interpreted: runs every plain-Triton kernel on CPU tensors, prints the mismatches per case as JSON."""

import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))

import numpy as np
import torch

import halfbyte.backends.registry  # noqa: F401  (binds the ops)
from halfbyte.backends.reference import blockwise as reference_8bit
from halfbyte.backends.reference import four_bit as reference
from halfbyte.backends.triton import device
from halfbyte.backends.triton.kernels.dequantize import _dequantize_4bit_kernel, _dequantize_blockwise_kernel
from halfbyte.backends.triton.kernels.gemm_portable import _gemm_4bit_portable_kernel, _sum_partial_kernel
from halfbyte.backends.triton.kernels.quantize import (
    _cells_8bit_kernel,
    _quantize_4bit_kernel,
    _quantize_blockwise_kernel,
)
from halfbyte.formats.codebook import codebook
from halfbyte.formats.dynamic import dynamic_map

wrong = defaultdict(list)
torch.manual_seed(1)


def same(a, b):
    return torch.equal(torch.nan_to_num(a.float(), nan=7.0), torch.nan_to_num(b.float(), nan=7.0))


def expect(case, ok, *what):
    wrong[case]
    if not ok:
        wrong[case].append(" ".join(map(str, what)))


def pairs(name):
    table = codebook(name).table
    byte = np.arange(256)
    return torch.from_numpy(np.ascontiguousarray(np.stack([table[byte >> 4], table[byte & 15]], 1)).view("<i8")[:, 0])


def hard(numel):
    x = torch.randn(numel) * 0.1
    if numel > 300:
        x[64:128] = 0.0
        x[130] = float("nan")
        x[200] = float("inf")
        x[256:290] = 1e-38 * torch.randn(34)
    return x


for name in ("nf4", "fp4", "af4"):
    book = codebook(name)
    cells = device.cells_of(book)
    entries = torch.from_numpy(cells.entries)
    for numel, blocksize in ((1, 64), (4097, 64), (4096, 64), (1000, 32), (5001, 4096), (640, 128)):
        x = hard(numel)
        if numel == 640:  # exact midpoints and levels, which decide ties
            x[:] = 0.01
            exact = np.concatenate([book.midpoints, -book.midpoints, book.table])
            x[1 : 1 + exact.size] = torch.from_numpy(exact)
            x[0] = 1.0
        packed_ref, absmax_ref = reference.quantize_4bit(x, blocksize, name, torch.uint8)
        packed, absmax = torch.full_like(packed_ref, 99), torch.full_like(absmax_ref, float("nan"))
        span = 4096
        _quantize_4bit_kernel[(-(-numel // span),)](
            x, packed, absmax, entries, numel, blocksize, span // blocksize, cells.per_unit,
            book.sign_bit is not None, book.zero_code, numel % span != 0,
        )  # fmt: skip
        expect("quantize", torch.equal(packed, packed_ref) and same(absmax, absmax_ref), name, numel, blocksize)
        for dtype in (torch.float32, torch.float16):  # the interpreter truncates to bf16
            want = reference.dequantize_4bit(packed_ref, absmax_ref, blocksize, name, [numel], dtype)
            got = torch.full_like(want, 5.0)
            _dequantize_4bit_kernel[(-(-numel // 512),)](
                packed_ref, absmax_ref, None, None, None, pairs(name), got, numel, 0, numel, -(-numel // 512), numel,
                blocksize, 32, 2, False,
            )  # fmt: skip
            expect("dequantize", same(got, want), name, numel, blocksize, dtype)

rows, cols, blocksize = 6, 320, 64
weight = torch.randn(rows, cols)
packed, absmax = reference.quantize_4bit(weight, blocksize, "nf4", torch.uint8)
code, offset = torch.from_numpy(dynamic_map()), absmax.mean()
absmax_8bit, absmax_2 = reference_8bit.quantize_blockwise(absmax - offset, code, 256)
nested = (absmax_8bit, code, offset)
want = reference.dequantize_4bit(packed, absmax_2, blocksize, "nf4", [rows, cols], torch.float32, *nested)
got = torch.empty_like(want)
numel = rows * cols
_dequantize_4bit_kernel[(-(-numel // 512),)](
    packed, absmax_2, *nested, pairs("nf4"), got, numel, 0, numel, -(-numel // 512), numel, blocksize, 32, 2, True
)
# The interpreter multiplies and adds in fp32 one after the other, as the launcher asks the compiler to.
expect("nested", same(got, want))
for first, count in ((0, 128), (136, 184)):
    part = torch.full((rows, count), 5.0)
    tiles = -(-count // 512)
    _dequantize_4bit_kernel[(rows * tiles,)](
        packed, absmax_2, *nested, pairs("nf4"), part, cols, first, count, tiles, numel, blocksize, 32, 2, True
    )
    expect("columns", same(part, want[:, first : first + count]), first, count)

for name, code in (
    ("dynamic", dynamic_map()),
    ("unsigned", dynamic_map(signed=False)),
    ("line", np.linspace(-1, 1, 256)),
    ("crowded", np.sort(np.concatenate([np.linspace(0.5, 0.501, 200), np.linspace(-1, 0.4, 56)]))),
):
    code = torch.from_numpy(np.asarray(code, np.float32))
    cells, widest = torch.empty(4096, dtype=torch.int64), torch.empty(64, dtype=torch.int32)
    cuts, kind = torch.empty(256), torch.empty(1, dtype=torch.int32)
    signed, unsigned = torch.from_numpy(dynamic_map()), torch.from_numpy(dynamic_map(signed=False))
    _cells_8bit_kernel[(64,)](code, signed, unsigned, cells, widest, cuts, kind, 64)
    expect("blockwise", int(kind) == {"dynamic": 1, "unsigned": 2}.get(name, 0), "kind", name)
    for numel, blocksize in ((1, 1), (1000, 100), (4097, 256), (8192, 256), (5001, 4096)):
        x = hard(numel)
        if numel == 4097:
            x[:255] = (code[:-1] + code[1:]) * 0.5
            x[255] = 1.0
        codes_ref, absmax_ref = reference_8bit.quantize_blockwise(x, code, blocksize)
        codes, absmax = torch.full_like(codes_ref, 99), torch.full_like(absmax_ref, float("nan"))
        width = 1 << (blocksize - 1).bit_length()
        count = max(1, 4096 // width)
        _quantize_blockwise_kernel[(-(-numel // (count * blocksize)),)](
            x,
            codes,
            absmax,
            code,
            cells,
            widest,
            cuts,
            kind,
            blocksize,
            numel,
            width,
            count,
            64,
            width != blocksize or numel % (count * width) != 0,
            False,
        )
        ok = torch.equal(codes, codes_ref) and same(absmax, absmax_ref)
        expect("blockwise", ok, name, numel, blocksize, int((codes != codes_ref).sum()))
        want = reference_8bit.dequantize_blockwise(codes_ref, absmax_ref, code, blocksize, torch.float32)
        got = torch.full_like(want, 5.0)
        width = next(w for w in (8, 4, 2, 1) if blocksize % w == 0)
        _dequantize_blockwise_kernel[(-(-numel // (32 * width * 2)),)](
            codes_ref, absmax_ref, code, got, blocksize, numel, 32, width, 2
        )
        expect("blockwise", same(got, want), "dequantize", name, numel, blocksize)

for m, n, k, blocksize in ((3, 40, 96, 64), (17, 33, 65, 32), (1, 16, 256, 128)):
    weight, x, bias = torch.randn(n, k), torch.randn(m, k), torch.randn(n)
    packed, absmax = reference.quantize_4bit(weight, blocksize, "fp4", torch.uint8)
    want = reference.gemm_4bit(x, packed, [n, k], absmax, blocksize, "fp4", bias)
    got = torch.full_like(want, float("nan"))
    levels = torch.from_numpy(codebook("fp4").table.copy())
    _gemm_4bit_portable_kernel[(-(-n // 32), -(-m // 16))](
        packed, x, absmax, None, None, None, levels, bias, got, m, n, k, k, 16, 32, 32, blocksize, False, True, True
    )
    expect("portable", torch.allclose(got, want, rtol=1e-5, atol=1e-4), m, n, k, blocksize)

partial, bias = torch.randn(3, 7, 5), torch.randn(5)
got = torch.full((7, 5), float("nan"))
_sum_partial_kernel[(1,)](partial, bias, got, 35, 5, 3, 64, True)
expect("sum", torch.allclose(got, partial.sum(0) + bias, atol=1e-6))

print(json.dumps(wrong))
