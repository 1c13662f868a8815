"""Looking rows up in a packed table on a GPU; whole quantized tables and heads there."""

from __future__ import annotations

import pytest
import torch

from halfbyte.backends.reference import blockwise as reference_8bit
from halfbyte.backends.reference import four_bit as reference
from halfbyte.formats.dynamic import dynamic_map

pytestmark = pytest.mark.gpu

ops = torch.ops.halfbyte
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "columns", "blocksize"), [(1000, 576, 64), (257, 4096, 64), (300, 1032, 128)])
def test_rows_are_those_of_the_dequantized_table(
    rows: int, columns: int, blocksize: int, nested: bool, dtype: torch.dtype
) -> None:
    table = torch.randn(rows, columns, device="cuda")
    packed, absmax = reference.quantize_4bit(table, blocksize, "nf4", torch.uint8)
    rest = []
    if nested:
        code, offset = torch.from_numpy(dynamic_map()).cuda(), absmax.mean()
        codes, absmax = reference_8bit.quantize_blockwise(absmax - offset, code, 256)
        rest = [codes, code, offset]
    whole = reference.dequantize_4bit(packed, absmax, blocksize, "nf4", [rows, columns], dtype, *rest)
    for kind in (torch.int64, torch.int32):
        ids = torch.randint(0, rows, (3, 41), device="cuda", dtype=kind)
        ids[0, 0], ids[0, 1] = 0, rows - 1
        found = ops.embedding_4bit(ids, packed, [rows, columns], absmax, blocksize, "nf4", dtype, *rest)
        assert torch.equal(found, whole[ids.long()])


def test_rows_of_any_width_and_numbers_of_no_row() -> None:
    for columns in (65, 100, 1024):
        packed, absmax = reference.quantize_4bit(torch.randn(50, columns, device="cuda"), 64, "nf4", torch.uint8)
        whole = reference.dequantize_4bit(packed, absmax, 64, "nf4", [50, columns], torch.float32)
        ids = torch.tensor([3, -1, 50, 1 << 40, 49], device="cuda")
        found = ops.embedding_4bit(ids, packed, [50, columns], absmax, 64, "nf4", torch.float32)
        assert torch.equal(found[[0, 4]], whole[[3, 49]])
        assert bool(found[1:4].isnan().all())


def test_a_look_up_is_captured_in_a_graph_and_compiled_whole() -> None:
    packed, absmax = reference.quantize_4bit(torch.randn(500, 256, device="cuda"), 64, "nf4", torch.uint8)
    whole = reference.dequantize_4bit(packed, absmax, 64, "nf4", [500, 256], torch.bfloat16)
    ids = torch.randint(0, 500, (16,), device="cuda")

    def look_up(ids: torch.Tensor) -> torch.Tensor:
        return ops.embedding_4bit(ids, packed, [500, 256], absmax, 64, "nf4", torch.bfloat16)

    look_up(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = look_up(ids)
    ids.copy_(torch.randint(0, 500, (16,)))
    graph.replay()
    assert torch.equal(found, whole[ids])
    assert torch.equal(torch.compile(look_up, fullgraph=True)(ids), whole[ids])


@pytest.mark.parametrize("batch", [1, 8, 64, 512])
def test_the_logits_of_a_whole_vocabulary_need_no_dequantized_head(batch: int) -> None:
    rows, columns = 128256, 2048
    packed, absmax = ops.quantize_4bit(
        torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16), 64, "nf4", torch.uint8
    )
    x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
    logits = ops.gemm_4bit(x, packed, [rows, columns], absmax, 64, "nf4")
    part = slice(100_000, 100_512)
    weight = ops.dequantize_4bit(packed, absmax, 64, "nf4", [rows, columns], torch.float32)[part]
    exact = x.float() @ weight.t()
    assert (logits[:, part].float() - exact).norm() / exact.norm() < 5e-3
    torch.cuda.synchronize()
    del weight, exact
    before, kept = torch.cuda.memory_allocated(), logits.numel() * 2
    torch.cuda.reset_peak_memory_stats()
    ops.gemm_4bit(x, packed, [rows, columns], absmax, 64, "nf4")
    torch.cuda.synchronize()
    # The bf16 table would be 525 MB. Long prompts may dequantize slices of 128 MB, tokens nothing.
    assert torch.cuda.max_memory_allocated() - before - kept < (4 << 20 if batch <= 64 else 136 << 20)


def test_a_tied_model_on_a_gpu_shares_one_packed_table() -> None:
    from halfbyte.nn import Embedding4bit, Linear4bit

    table = Embedding4bit(3000, 256, dtype=torch.bfloat16, quant_type="nf4")
    head = Linear4bit(256, 3000, False, torch.bfloat16)
    head.weight = table.weight
    model = torch.nn.Sequential(table, head).cuda()
    assert model[0].weight is model[1].weight
    ids = torch.randint(0, 3000, (2, 5), device="cuda")
    rows = model[0](ids)
    values = reference.dequantize_4bit(
        table.weight.data, table.quant_state.absmax, 64, "nf4", [3000, 256], torch.bfloat16
    )
    assert torch.equal(rows, values[ids])
    exact = rows.float() @ values.float().t()
    assert (model(ids).float() - exact).norm() / exact.norm() < 5e-3
    back = model.cpu()
    assert torch.equal(back[0](ids.cpu()), rows.cpu())
