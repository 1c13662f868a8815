"""LoRA on a 4-bit layer that is not plain is left to peft's own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize
from peft import LoraConfig
from torch import Tensor

from halfbyte.errors import QuantStateMissingError
from halfbyte.nn import Linear4bit
from tests.integrations.lora_layers import Doubled, X, lora, ordinary, results


def two_adapters(layer: Any) -> None:
    layer.update_layer("second", 4, 8, config=LoraConfig(r=4, init_lora_weights=False))
    layer.set_adapter(["default", "second"])


def hooked(layer: Any) -> None:
    layer.lora_A["default"].register_forward_hook(lambda module, args, out: out * 2)  # noqa: ARG005


def wrapped_forward(layer: Any) -> None:
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: forward(x) + 1


def disabled(layer: Any) -> None:
    layer.enable_adapters(False)


def merged(layer: Any) -> None:
    layer.merge()


def another_dtype(layer: Any) -> None:
    layer.lora_A.to(torch.bfloat16)
    layer.lora_B.to(torch.bfloat16)


def trained_bias(layer: Any) -> None:
    layer.base_layer.bias.requires_grad_(True)


def fp16_product(layer: Any) -> None:
    layer.base_layer.compute_dtype = torch.bfloat16


def adapter_of_other_layers(layer: Any) -> None:
    layer.set_adapter("elsewhere")


def second_factor_hooked(layer: Any) -> None:
    layer.lora_B["default"].register_forward_hook(lambda module, args, out: out * 2)  # noqa: ARG005


def hooked_before(layer: Any) -> None:
    layer.lora_A["default"].register_forward_pre_hook(lambda module, args: (args[0] * 2,))  # noqa: ARG005


def shifted(layer: Linear4bit, x: Tensor) -> Tensor:
    return Linear4bit.forward(layer, x) + 1


def subclass_of_the_base(layer: Any) -> None:
    layer.base_layer.__class__ = type("Shifted", (Linear4bit,), {"forward": shifted})


def learned_scaling(layer: Any) -> None:
    layer.scaling["default"] = torch.nn.Parameter(torch.tensor(2.0))


def bias_of_the_first_factor(layer: Any) -> None:
    layer.lora_A["default"].bias = torch.nn.Parameter(torch.ones(8))


def parametrized_factor(layer: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(layer.lora_A["default"], "weight", Doubled())


class Tied(torch.nn.Parameter):
    """A parameter with a meaning of its own, as sharded ones have."""


def first_factor_of_another_kind(layer: Any) -> None:
    layer.lora_A["default"].weight = Tied(layer.lora_A["default"].weight.detach())


def second_factor_of_another_kind(layer: Any) -> None:
    layer.lora_B["default"].weight = Tied(layer.lora_B["default"].weight.detach())


CHANGES = [
    two_adapters, hooked, wrapped_forward, disabled, merged, another_dtype, trained_bias, fp16_product,
    adapter_of_other_layers, second_factor_hooked, hooked_before, subclass_of_the_base, learned_scaling,
    bias_of_the_first_factor, parametrized_factor, first_factor_of_another_kind, second_factor_of_another_kind,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore:Merge lora module")
def test_what_is_not_plain_is_left_to_peft(lora_steps: list[torch.Size], change: Callable[[Any], None]) -> None:
    layer = lora(bias=True)
    change(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=0, atol=0)
    assert lora_steps == []


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants_of_lora_are_left_to_peft(lora_steps: list[torch.Size], settings: dict[str, Any]) -> None:
    layer = lora(**settings)
    torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=0, atol=0)
    assert lora_steps == []


@pytest.mark.parametrize("name", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_the_backward_pass_are_called(lora_steps: list[torch.Size], name: str) -> None:
    layer, heard = lora(), []
    getattr(layer.lora_A["default"], name)(lambda module, *grads: heard.append(len(grads)))  # noqa: ARG005
    results(type(layer).forward, layer, X)
    assert len(heard) == 1
    assert lora_steps == []


def test_hooks_of_all_modules_are_called(lora_steps: list[torch.Size]) -> None:
    layer, heard = lora(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: heard.append(module))  # noqa: ARG005
    try:
        type(layer).forward(layer, X)
    finally:
        handle.remove()
    assert layer.lora_A["default"] in heard
    assert lora_steps == []


def test_activations_of_another_class_are_left_to_peft(lora_steps: list[torch.Size]) -> None:
    class Marked(Tensor):
        pass

    layer, x = lora(), X.as_subclass(Marked)
    found = layer(x)
    assert type(found) is type(ordinary(layer, x))
    assert lora_steps == []


@pytest.mark.parametrize(
    ("base", "x"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)], ids=["base", "activations"]
)
def test_other_dtypes_than_that_of_autocast_are_left_to_peft(
    lora_steps: list[torch.Size], base: torch.dtype, x: torch.dtype
) -> None:
    layer = lora(base)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(X.to(x)), ordinary(layer, X.to(x))
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected)
    assert lora_steps == []


def test_factors_of_two_dtypes_fail_as_in_peft(lora_steps: list[torch.Size]) -> None:
    layer = lora()
    layer.lora_B.to(torch.bfloat16)
    for call in (type(layer).forward, ordinary):
        with pytest.raises(RuntimeError, match="dtype"):
            call(layer, X)
    assert lora_steps == []


def test_adapters_chosen_by_row_are_left_to_peft(lora_steps: list[torch.Size]) -> None:
    layer = lora().eval()
    found = layer(X, adapter_names=["default", "__base__"])
    torch.testing.assert_close(found[0], ordinary(layer, X)[0])
    torch.testing.assert_close(found[1], layer.base_layer(X)[1])
    assert lora_steps == []


def test_arguments_that_the_layer_does_not_take_are_refused_as_in_peft() -> None:
    with pytest.raises(TypeError):
        lora()(X, 1)


def test_transforms_of_torch_func_differentiate_what_peft_computes(lora_steps: list[torch.Size]) -> None:
    layer = lora()
    with torch.no_grad():
        _, found = torch.func.jvp(layer, (X,), (torch.ones_like(X),))
        _, expected = torch.func.jvp(lambda x: ordinary(layer, x), (X,), (torch.ones_like(X),))
    torch.testing.assert_close(found, expected)
    assert lora_steps == []


def test_a_weight_that_was_never_quantized_is_the_layers_own_error(lora_steps: list[torch.Size]) -> None:
    layer = lora()
    layer.base_layer = Linear4bit(64, 48, bias=False, compute_dtype=torch.float32)
    for call in (type(layer).forward, ordinary):
        with pytest.raises(QuantStateMissingError, match="Linear4bit was called before its weight was quantized"):
            call(layer, X)
    assert lora_steps == []


def test_a_compiled_layer_is_one_graph(lora_steps: list[torch.Size]) -> None:
    layer = lora()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), ordinary(layer, X))
    assert lora_steps == []
