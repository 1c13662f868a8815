"""Every method of peft on 4-bit and 8-bit layers does what it does on a dense model with the dequantized weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import halfbyte.functional as F
from halfbyte.nn import Linear4bit, Linear8bitLt
from tests.integrations.conftest import saved, tiny_llama
from tests.integrations.peft_methods import METHODS, OPERATIONS

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
BITS = (4, 8)
# Activations are int8 in 8-bit layers: their products are off by half a step of 127.
FORWARD_ERROR = {4: 1e-4, 8: 0.05}
each = pytest.mark.parametrize("name", METHODS)
each_width = pytest.mark.parametrize("bits", BITS)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block, in bf16."""
    torch.manual_seed(5)
    return saved(tiny_llama(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 256, (2, 16))


def quantized(folder: Path, bits: int) -> Any:
    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def values(layer: Any) -> Tensor:
    """The weight of a quantized layer, dequantized."""
    if isinstance(layer, Linear4bit):
        return F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return F.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)


def requantized(weight: Tensor, bits: int) -> Tensor:
    """``weight`` after one rounding to codes."""
    if bits == 4:
        return F.dequantize_4bit(*F.quantize_4bit(weight, quant_type="nf4"))
    return F.int8_vectorwise_dequant(*F.int8_vectorwise_quant(weight)[:2])


def layers(model: torch.nn.Module) -> dict[str, Any]:
    """Quantized layers by the name they have without an adapter."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, (Linear4bit, Linear8bitLt))
    }


def base_weights(model: torch.nn.Module) -> dict[str, Any]:
    """The dense layers of a twin, adapted or not, by the same names."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
    }


def adapted(folder: Path, name: str, bits: int) -> tuple[Any, Any]:
    """A quantized model with an adapter of random values, and its dense twin: same weights, same adapter."""
    method = METHODS[name]
    base = quantized(folder, bits)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path, layer in layers(base).items():
        dense.get_submodule(path).weight.data = values(layer)
    torch.manual_seed(0)
    model = get_peft_model(base, method.config())
    torch.manual_seed(0)
    twin = get_peft_model(dense, method.config())
    theirs = dict(twin.named_parameters())
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * method.size)
                theirs[path].copy_(parameter)
    return model.eval(), twin.eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def refused(name: str, operation: str, action: Callable[[], object]) -> bool:
    """Whether peft refuses, which must then be with the error that the table states."""
    error = METHODS[name].refusals.get(operation)
    if error is None:
        return False
    with pytest.raises(error) as caught:
        action()
    assert type(caught.value) is error
    assert "/peft/" in Path(caught.traceback[-1].path).as_posix()
    return True


@each_width
@each
def test_forward(name: str, bits: int, tiny_dir: Path, ids: Tensor) -> None:
    model, twin = adapted(tiny_dir, name, bits)
    expected = logits(twin, ids)
    with twin.disable_adapter():
        change = (expected - logits(twin, ids)).norm()
    assert change > 0.05 * expected.norm()
    assert (logits(model, ids) - expected).norm() < FORWARD_ERROR[bits] * change


@each_width
@each
def test_backward(name: str, bits: int, tiny_dir: Path, ids: Tensor) -> None:
    model, twin = adapted(tiny_dir, name, bits)
    for one in (model, twin):
        torch.manual_seed(3)  # PVeRA draws
        one.train()(input_ids=ids, labels=ids).loss.backward()
    theirs = dict(twin.named_parameters())
    found = [(p.grad, theirs[path].grad) for path, p in model.named_parameters() if p.requires_grad]
    assert found
    ours, exact = (torch.cat([pair[side].flatten() for pair in found]) for side in (0, 1))
    assert (ours - exact).norm() < FORWARD_ERROR[bits] * exact.norm()
    assert exact.norm() > 0


def assert_same_codes(model: Any, dense: Any, bits: int) -> None:
    """The layers of ``model`` hold what quantizing the weights of ``dense`` gives, but for sums at a midpoint."""
    twins = base_weights(dense)
    for path, layer in layers(model).items():
        expected, found = requantized(twins[path].weight.detach(), bits), values(layer)
        # Sums in another order move a scale by 2^-23, and a value at a midpoint by one code.
        other = (found - expected).abs() > 1e-5 * expected.abs().max()
        assert other.float().mean() < 0.002, path
        assert (found - expected).norm() < 0.02 * expected.norm(), path


@each_width
@each
def test_merge(name: str, bits: int, tiny_dir: Path) -> None:
    model, twin = adapted(tiny_dir, name, bits)
    before = {path: values(layer) for path, layer in layers(model).items()}
    if refused(name, "merge", model.merge_adapter):
        return
    model.merge_adapter()
    twin.merge_adapter()
    assert_same_codes(model, twin, bits)
    changed = {path for path, layer in layers(model).items() if not torch.equal(values(layer), before[path])}
    assert {path.rpartition(".")[2] for path in changed} == METHODS[name].config().target_modules


@each_width
@each
def test_unmerge(name: str, bits: int, tiny_dir: Path, ids: Tensor) -> None:
    model, twin = adapted(tiny_dir, name, bits)
    if refused(name, "unmerge", lambda: model.base_model.model.model.layers[0].self_attn.v_proj.unmerge()):
        return
    model.merge_adapter()
    twin.merge_adapter()
    twins = base_weights(twin)
    for path, layer in layers(model).items():
        twins[path].weight.data = values(layer)
    model.unmerge_adapter()
    if name == "HiRA":  # the dense layer keeps a copy of its weight, a quantized one divides
        for layer in (
            module for module in twin.modules() if type(module).__name__ == "Linear" and hasattr(module, "hira_A")
        ):
            layer.base_layer.weight.data /= 1 + layer.get_delta_weight("default")
    else:
        twin.unmerge_adapter()
    assert_same_codes(model, twin, bits)
    assert torch.isfinite(logits(model, ids)).all()


@each_width
@each
def test_merge_and_unload(name: str, bits: int, tiny_dir: Path, ids: Tensor) -> None:
    model, twin = adapted(tiny_dir, name, bits)
    if refused(name, "merge_and_unload", model.merge_and_unload):
        return
    merged, dense = model.merge_and_unload(), twin.merge_and_unload()
    assert not any("lora" in path or "base_layer" in path for path, _ in merged.named_parameters())
    assert_same_codes(merged, dense, bits)
    for path, layer in layers(merged).items():
        dense.get_submodule(path).weight.data = values(layer)
    expected = logits(dense, ids)
    assert (logits(merged, ids) - expected).norm() < (1e-4 if bits == 4 else 0.02) * expected.norm()


@each_width
@each
def test_save_and_load(name: str, bits: int, tiny_dir: Path, tmp_path: Path, ids: Tensor) -> None:
    model, _ = adapted(tiny_dir, name, bits)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(tiny_dir, bits), tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert not torch.equal(logits(again, ids), logits(quantized(tiny_dir, bits).eval(), ids))


@each_width
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "OFT"])
def test_gradient_checkpointing_changes_no_gradient(name: str, bits: int, tiny_dir: Path, ids: Tensor) -> None:
    model, _ = adapted(tiny_dir, name, bits)
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for one in (model, again):
        one.train()(input_ids=ids, labels=ids).loss.backward()
    assert again.base_model.model.model.layers[0].gradient_checkpointing
    pairs = zip(model.named_parameters(), again.parameters(), strict=True)
    assert all(torch.equal(p.grad, q.grad) for (_, p), q in pairs if p.requires_grad)


def table() -> list[str]:
    """The rows of docs/peft.md, from what the tests above show."""
    rows = []
    for name, method in METHODS.items():
        cells = [f"peft raises `{method.refusals[o].__name__}`" if o in method.refusals else "yes" for o in OPERATIONS]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def test_the_page_has_the_table_that_these_tests_check() -> None:
    found = re.findall(rf"^\| (?:{'|'.join(METHODS)}) \|.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found == table()
