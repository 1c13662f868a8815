"""Models loaded by transformers: 8 bits without graph breaks, 4 bits through inductor, exported programs on disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.integrations.conftest import saved, tiny_llama
from tests.integrations.test_offload import config


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(11)
    return saved(tiny_llama(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def load(folder: Path, bits: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config(bits))
    model.config.use_cache = False
    return model.eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 256, (2, 16))


def close(found: Tensor, expected: Tensor, bits: int) -> bool:
    """Compiled sums have another order; in 8 bits that moves an activation's code here and there."""
    return bool((found - expected).norm() < (1e-5 if bits == 4 else 1e-2) * expected.norm())


@pytest.mark.parametrize(("bits", "backend"), [(8, "aot_eager"), (4, "inductor")])
def test_a_whole_model_compiles_without_graph_breaks(bits: int, backend: str, tiny_dir: Path, ids: Tensor) -> None:
    model = load(tiny_dir, bits)
    with torch.no_grad():
        expected = model(ids).logits
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        assert close(compiled(ids).logits, expected, bits)


def test_a_training_step_in_8_bits_compiles_without_graph_breaks(tiny_dir: Path, ids: Tensor) -> None:
    def gradients(compile_it: bool) -> Tensor:
        torch.manual_seed(0)
        model = get_peft_model(load(tiny_dir, 8), LoraConfig(r=4, target_modules=["q_proj", "up_proj"])).train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)

        def loss(tokens: Tensor) -> Tensor:
            return model(input_ids=tokens, labels=tokens).loss

        step = torch.compile(loss, fullgraph=True, backend="aot_eager") if compile_it else loss
        step(ids).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    assert close(gradients(True), gradients(False), 8)


def test_a_whole_4bit_model_is_exported_saved_and_loaded(tiny_dir: Path, ids: Tensor) -> None:
    model = load(tiny_dir, 4)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model(input_ids=tokens).logits

    with torch.no_grad():
        program = torch.export.export(Logits(), (ids,))
        expected = model(ids).logits
        assert close(program.module()(ids), expected, 4)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        again = torch.export.load(file)
        assert close(again.module()(ids), expected, 4)
    names = {str(node.target) for node in program.graph.nodes}
    assert any("halfbyte" in name for name in names)
