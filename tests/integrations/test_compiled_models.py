"""Whole quantized models as one graph: inference, a QLoRA training step, export."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from halfbyte.nn import LinearNF4
from tests.support.small_llama import TOKENS, adapted_llama, gradients, small_llama


def test_inference_is_one_graph() -> None:
    model = small_llama()
    assert sum(type(module) is LinearNF4 for module in model.modules()) == 14
    with torch.no_grad():
        want = model(TOKENS).logits
        torch.compiler.reset()
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(TOKENS).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_a_training_step_is_one_graph_with_the_eager_gradients() -> None:
    model = adapted_llama()
    model(TOKENS, labels=TOKENS).loss.backward()
    want = gradients(model)
    assert len(want) == 8
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(TOKENS, labels=TOKENS).loss.backward()
    found = gradients(model)
    assert found.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def test_a_model_is_exported_and_computes_the_same() -> None:
    model = small_llama()
    with torch.no_grad():
        want = model(TOKENS).logits
        program = torch.export.export(model, (TOKENS,), strict=False)
        products = [node for node in program.graph.nodes if "halfbyte.gemm_4bit" in str(node.target)]
        assert len(products) == 14
        torch.testing.assert_close(program.module()(TOKENS).logits, want, rtol=1e-4, atol=1e-5)
