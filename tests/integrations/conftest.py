"""halfbyte in bitsandbytes' place for this folder, and tiny models of the kinds that differ in how they load."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import halfbyte
from halfbyte.integrations import libraries, peft_lora
from halfbyte.integrations.bitsandbytes.finder import find_installed

LLAMA = LlamaConfig(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    max_position_embeddings=128,
)


def tiny_llama() -> LlamaForCausalLM:
    """A Llama of one block of square attention layers, for tests of many cases."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA.to_dict(), **sizes, "head_dim": 16}))


@pytest.fixture(scope="package", autouse=True)
def bnb() -> Iterator[ModuleType]:
    """``bitsandbytes``, which is halfbyte; gone again after this folder's tests."""
    halfbyte.install_as_bitsandbytes()
    yield importlib.import_module("bitsandbytes")
    finder = find_installed()
    assert finder is not None
    sys.meta_path.remove(finder)  # pyright: ignore[reportArgumentType]
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        del sys.modules[name]
    for module, function in libraries.CACHED:
        if module in sys.modules:
            getattr(sys.modules[module], function).cache_clear()


@pytest.fixture(autouse=True)
def no_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def lora_steps(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs with which LoRA on a 4-bit layer was one step."""
    seen: list[torch.Size] = []
    real = peft_lora.low_rank_matmul_4bit

    def listed(x: Tensor, *args: Any) -> Tensor:
        seen.append(x.shape)
        return real(x, *args)

    monkeypatch.setattr(peft_lora, "low_rank_matmul_4bit", listed)
    return seen


def saved(model: torch.nn.Module, folder: Path) -> Path:
    """The folder, with the model in bf16."""
    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    return folder


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with its own lm_head: 7 linear layers in each of 2 blocks."""
    torch.manual_seed(1)
    return saved(LlamaForCausalLM(LLAMA), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose lm_head is its embedding table."""
    torch.manual_seed(2)
    config = LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
    return saved(LlamaForCausalLM(config), tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2, whose linear layers are Conv1D: transposed."""
    torch.manual_seed(3)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=64, bos_token_id=0, eos_token_id=0)
    return saved(GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two rows of 12 token ids."""
    return torch.randint(0, 256, (2, 12))


@pytest.fixture(scope="session")
def shim_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the separate distribution installed, built from a copy of ``shim/``."""
    folder = tmp_path_factory.mktemp("shim")
    source = shutil.copytree(Path(__file__).parents[2] / "shim", folder / "source")
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", *words, str(source)], check=True)
    return folder / "site"
