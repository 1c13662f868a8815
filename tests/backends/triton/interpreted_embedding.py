"""Child of test_embedding: runs the look-up kernel on CPU tensors under Triton's interpreter, prints mismatches."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))

import numpy as np
import torch

import halfbyte.backends.registry  # noqa: F401  (binds the ops)
from halfbyte.backends.reference import blockwise, four_bit
from halfbyte.backends.triton.kernels.embedding import _embedding_4bit_kernel
from halfbyte.formats.codebook import codebook
from halfbyte.formats.dynamic import dynamic_map

torch.manual_seed(1)
byte = np.arange(256)
levels = codebook("nf4").table
pairs = torch.from_numpy(np.ascontiguousarray(np.stack([levels[byte >> 4], levels[byte & 15]], 1)).view("<i8")[:, 0])
wrong = []
for rows, columns, blocksize, lanes in ((40, 64, 64, 32), (33, 328, 64, 32), (9, 24, 32, 32), (600, 64, 32, 32)):
    packed, absmax = four_bit.quantize_4bit(torch.randn(rows, columns), blocksize, "nf4", torch.uint8)
    code, offset = torch.from_numpy(dynamic_map()), absmax.mean()
    codes, second = blockwise.quantize_blockwise(absmax - offset, code, 256)
    for nested in (False, True):
        scales = (second, codes, code, offset) if nested else (absmax, None, None, None)
        for kind in (torch.int64, torch.int32):
            indices = torch.tensor([0, rows - 1, 3, 3], dtype=kind)
            whole = four_bit.dequantize_4bit(
                packed, scales[0], blocksize, "nf4", [rows, columns], torch.float32, *scales[1:]
            )
            got = torch.full((6, columns), 5.0)
            tiles = -(-columns // (8 * lanes))
            ids = torch.cat([indices, torch.tensor([-1, rows], dtype=kind)])
            _embedding_4bit_kernel[(6 * tiles,)](
                ids, packed, *scales, pairs, got, rows, columns, tiles, blocksize, lanes, nested
            )
            if not torch.equal(got[:4], whole[indices.long()]) or not bool(got[4:].isnan().all()):
                wrong.append([rows, columns, blocksize, nested, str(kind)])
print(json.dumps(wrong))
