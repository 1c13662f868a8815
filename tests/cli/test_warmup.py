"""``halfbyte warmup``: compiles what it says, for the dtype of a model, and refuses what it cannot read."""

import json
from pathlib import Path

import pytest
import torch

from halfbyte.backends.cpu import ahead
from halfbyte.cli import main as cli
from halfbyte.cli.warmup import _dtype_of, experts_of, shapes_of
from halfbyte.errors import ArgumentError
from tests.support.python import python, python_code


def test_a_second_process_finds_everything_compiled(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "float32"}))
    cache = {"HALFBYTE_CACHE_DIR": str(tmp_path / "cache")}
    done = python(["-m", "halfbyte", "warmup", tmp_path], **cache)
    assert done.returncode == 0, done.stderr
    assert f"cpu: {len(ahead.plan([torch.float32], (64,), (False, True)))} kernels" in done.stdout
    printed = python_code(
        """
import torch
from halfbyte import backends
from halfbyte.backends.cpu import compiler
def refuse(*args): raise AssertionError("compiled again")
compiler.object_code = refuse
op = torch.ops.halfbyte
for batch in (1, 3, 200):
    packed, absmax = op.quantize_4bit(torch.randn(64, 64), 64, "nf4", torch.uint8)
    op.gemm_4bit(torch.randn(batch, 64), packed, (64, 64), absmax, 64, "nf4")
print("ok")
""",
        **cache,
    )
    assert printed.strip() == "ok"


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"dtype": "float32", "quantization_config": {"bnb_4bit_compute_dtype": "bfloat16"}}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_the_dtype_is_what_the_model_computes_in(config: dict[str, object], dtype: str) -> None:
    assert _dtype_of(config) == dtype


def test_a_folder_without_a_config_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["warmup", str(tmp_path)]) == 2
    assert "expected the folder of a model" in capsys.readouterr().err


def test_a_dtype_without_kernels_is_refused() -> None:
    with pytest.raises(ArgumentError, match="'float8_e4m3fn'; expected float32, bfloat16, float16"):
        _dtype_of({"dtype": "float8_e4m3fn"})


def test_the_shapes_are_those_of_the_blocks_layers() -> None:
    llama = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    assert shapes_of(llama) == [(1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096)]
    assert shapes_of({"text_config": llama}) == shapes_of(llama)
    assert (4096, 2560) in shapes_of({"hidden_size": 2560, "num_attention_heads": 32, "head_dim": 128})


def test_a_model_of_another_kind_has_no_shapes_to_tell() -> None:
    assert shapes_of({"d_model": 512}) == []


def test_help_and_a_wrong_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["warmup", "--help"]) == 0
    assert cli.main(["warmup", "--no-such-option"]) == 2
    capsys.readouterr()


QWEN3_MOE = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}


def test_experts_are_those_of_the_configuration_in_every_librarys_words() -> None:
    stacks = [(128, 8, 1536, 2048, False), (128, 8, 2048, 768, False)]
    assert experts_of(QWEN3_MOE) == experts_of({"text_config": QWEN3_MOE}) == stacks
    deepseek = {**QWEN3_MOE, "n_routed_experts": 64}
    del deepseek["num_experts"]
    assert [stack[0] for stack in experts_of(deepseek)] == [64, 64]
    gpt_oss = {"model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4}
    assert experts_of({**gpt_oss, "num_experts_per_tok": 1})[0] == (4, 1, 128, 64, True)


def test_a_model_without_experts_has_none() -> None:
    assert experts_of({"hidden_size": 64, "intermediate_size": 128}) == []
    assert experts_of({**QWEN3_MOE, "num_experts": None}) == []


def test_dense_layers_beside_experts_are_compiled_for_only_where_there_are_some() -> None:
    assert (6144, 2048) not in shapes_of(QWEN3_MOE)
    assert (6144, 2048) in shapes_of({**QWEN3_MOE, "first_k_dense_replace": 3})
    assert (6144, 2048) in shapes_of({**QWEN3_MOE, "mlp_only_layers": [0]})
