"""Child of test_grouped: runs the plain-Triton kernels for experts on CPU tensors, prints the mismatches as JSON."""

import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))

import torch
import triton

from halfbyte.backends.reference import grouped as reference
from halfbyte.backends.triton.grouped import tile_bound
from halfbyte.backends.triton.kernels.grouped import (
    _gemm_4bit_grouped_portable_kernel,
    _group_rows_kernel,
    _place_rows_kernel,
)
from halfbyte.formats.codebook import codebook
from halfbyte.functional import kernel_scales, quantize_4bit

wrong = defaultdict(list)
torch.manual_seed(3)

for rows, count in ((1, 1), (7, 5), (33, 40), (70, 3)):
    experts = torch.randint(-1, count + 2, (rows,))
    order, ends = torch.full((rows,), -1, dtype=torch.int32), torch.full((count,), -1, dtype=torch.int32)
    programs = -(-rows // 32)
    _group_rows_kernel[(programs + -(-count // 32),)](experts, order, ends, rows, count, programs, 32, 16)
    exact = reference.group_rows(experts, count)
    wrong["group"]
    if not (torch.equal(order, exact[0]) and torch.equal(ends, exact[1])):
        wrong["group"].append(f"{rows} {count}")

levels = torch.from_numpy(codebook("nf4").table.copy())
for count, n, k, blocksize in ((3, 20, 32, 64), (4, 33, 64, 32), (2, 16, 48, 64)):
    for transposed in (False, True):
        for nested in (False, True):
            weight = torch.randn(count, n, k) * 0.1
            packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=blocksize, compress_statistics=nested)
            scales = kernel_scales(state)
            x = torch.randn(5, n if transposed else k)
            bias = torch.randn(count, k if transposed else n)
            order, ends = reference.group_rows(torch.randint(0, count + 1, (5, 4)), count)
            arguments = (x, packed, [count, n, k], order, ends, scales[0], blocksize, "nf4", transposed, bias)
            exact = reference.gemm_4bit_grouped(*arguments, *scales[1:])
            out = torch.full(exact.shape, 9.0)
            batch, width = 4, exact.shape[1]
            _gemm_4bit_grouped_portable_kernel[(tile_bound(20, count, batch), -(-width // 32))](
                packed, x, order, ends, scales[0], *scales[1:], levels, bias, out, 20, count, width, x.shape[1],
                x.stride(0), 4, triton.next_power_of_2(count + 1), batch, 32, 32, blocksize, transposed, nested, True,
                True,
            )  # fmt: skip
            wrong["product"]
            if not torch.allclose(out, exact, atol=2e-5):
                wrong["product"].append(
                    f"{count} {n} {k} {blocksize} {transposed} {nested} {(out - exact).abs().max()}"
                )

for count, width, n, first in ((3, 20, 20, 0), (4, 17, 60, 40)):
    for with_bias in (False, True):
        order, ends = reference.group_rows(torch.randint(0, count + 1, (7, 2)), count)
        part = torch.randn(14, width)
        part[ends[-1] :] = torch.nan  # as torch's product leaves rows without an expert
        bias = torch.randn(count, n) if with_bias else None
        out, exact = torch.full((14, n), 9.0), torch.full((14, n), 9.0)
        for place, row in enumerate(order.tolist()):
            expert = int((ends <= place).sum())
            values = part[place] if expert < count else torch.zeros(width)
            if bias is not None and expert < count:
                values = values + bias[expert, first : first + width]
            exact[row, first : first + width] = values
        _place_rows_kernel[(14, -(-width // 16))](
            part, order, ends, bias, out, count, width, width, n, first, 4, 16, with_bias
        )
        wrong["place"]
        if not torch.equal(out, exact):
            wrong["place"].append(f"{count} {width} {n} {first} {with_bias}")

print(json.dumps(wrong))
