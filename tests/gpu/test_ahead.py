"""Compiling ahead and tuning on a GPU: what a later process needs is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from halfbyte.backends.triton import tune, tuning
from halfbyte.backends.triton.device import gpu_of
from tests.support.python import python, python_code

pytestmark = pytest.mark.gpu

FIRST_STEPS = """
import torch, triton
compiled = []
triton.knobs.compilation.listener = lambda src, cache_hit, **_: compiled.append((cache_hit, src.name))
from halfbyte.nn import Linear4bit
torch.set_grad_enabled(False)
for nested in (False, True):
    layer = Linear4bit(256, 512, False, torch.bfloat16, nested, "nf4").to(torch.bfloat16).cuda()
    for rows in (1, 8, 32, 64, 256, 2048):
        layer(torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16))
ops = torch.ops.halfbyte
packed = torch.zeros(4 * 512 * 256 // 2, 1, device="cuda", dtype=torch.uint8)
absmax = torch.ones(4 * 512 * 256 // 64, device="cuda")
for tokens in (1, 8):
    order, ends = ops.group_rows(torch.randint(0, 4, (tokens, 2), device="cuda"), 4)
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    ops.gemm_4bit_grouped(x, packed, [4, 512, 256], order, ends, absmax, 64, "nf4")
torch.cuda.synchronize()
assert compiled, "nothing was looked up"
print(sorted({name for hit, name in compiled if not hit}))
"""


def test_what_warmup_compiled_is_all_that_a_first_forward_needs(tmp_path: Path) -> None:
    config = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "head_dim": 256}
    config |= {"num_local_experts": 4, "num_experts_per_tok": 2, "dtype": "bfloat16", "mlp_only_layers": [0]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "HALFBYTE_CACHE_DIR": str(tmp_path / "halfbyte")}
    done = python(["-m", "halfbyte", "warmup", tmp_path], **cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton: kernels for" in done.stdout
    assert python_code(FIRST_STEPS, **cache).splitlines()[-1] == "[]"


def test_tuning_measures_on_this_gpu_and_its_tile_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = gpu_of(torch.cuda.current_device())
    some = [tile for tile in tune.candidates(1, gpu.arch, tune._shared_bytes()) if tile.rows == 16][:3]
    monkeypatch.setattr(tune, "candidates", lambda *_: iter(some))
    monkeypatch.setattr(tune, "COLD_BYTES", 1 << 20)
    steps: list[str] = []
    document = tune.tune([(256, 512)], [1], 1, lambda total: steps.append(str(total)), steps.append)
    assert (steps[0], len(steps)) == ("4", 5)
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path))
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / f"{gpu.arch}.json").write_text(json.dumps(document))
    for cached in (tuning.read, tuning.tile_for):
        cached.cache_clear()
    try:
        assert tuning.Tile(**document["tiles"][0]["tile"]) in some
        assert tuning.tile_for(gpu, 1, 256, 512) == tuning.Tile(**document["tiles"][0]["tile"])
    finally:
        for cached in (tuning.read, tuning.tile_for):
            cached.cache_clear()
