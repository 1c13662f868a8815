"""LoRA on a 4-bit layer in one step: it computes what peft's own forward does, and leaves to it what is not plain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize
import torch.utils.checkpoint
from peft import LoraConfig, get_peft_model
from torch import Tensor

from halfbyte.errors import QuantStateMissingError
from halfbyte.integrations import peft_lora
from halfbyte.nn import Linear4bit
from tests.support.listening import Listener


class Model(torch.nn.Module):
    is_loaded_in_4bit = True  # as transformers marks it; peft asks

    def __init__(self, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.proj = Linear4bit(64, 48, bias, dtype, quant_type="nf4").to("cpu")
        self.proj.requires_grad_(False)
        if bias:
            self.proj.bias.data = self.proj.bias.data.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def lora(dtype: torch.dtype = torch.float32, bias: bool = False, **settings: Any) -> Any:
    """peft's layer around a 4-bit one, its adapter made to count."""
    torch.manual_seed(3)
    config = LoraConfig(r=8, lora_alpha=24, target_modules=["proj"], **settings)
    layer = get_peft_model(Model(dtype, bias), config, autocast_adapter_dtype=False).base_model.model.proj
    for name in ("lora_A", "lora_B"):
        for module in layer._modules[name].values():
            module.weight.data = (torch.randn(module.weight.shape) * 0.2).to(dtype)
    return layer


def ordinary(layer: Any, x: Tensor) -> Tensor:
    return type(layer).forward.__wrapped__(layer, x)


def results(call: Callable[[Any, Tensor], Tensor], layer: Any, x: Tensor) -> list[Tensor]:
    """The product and the gradients of the sum of its squares."""
    x = x.clone().requires_grad_()
    torch.manual_seed(11)
    product = call(layer, x)
    found = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [product.detach(), *torch.autograd.grad(product.float().square().sum(), [x, *found])]


def close(found: list[Tensor], expected: list[Tensor], within: float = 1e-6) -> None:
    """Every tensor's distance, relative to the expected one's length, is small."""
    for own, right in zip(found, expected, strict=True):
        assert own.shape == right.shape
        assert (own - right).float().norm() <= within * right.float().norm()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs that took one step."""
    seen: list[torch.Size] = []
    real = peft_lora.low_rank_matmul_4bit

    def listed(x: Tensor, *args: Any) -> Tensor:
        seen.append(x.shape)
        return real(x, *args)

    monkeypatch.setattr(peft_lora, "low_rank_matmul_4bit", listed)
    return seen


X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_product_and_gradients_are_those_of_peft(steps: list[torch.Size], bias: bool, dropout: float) -> None:
    layer = lora(bias=bias, lora_dropout=dropout)
    found, expected = (results(call, layer, X) for call in (type(layer).forward, ordinary))
    assert steps == [X.shape]
    close(found, expected)


def test_in_bf16_it_is_no_further_from_fp32_than_peft(steps: list[torch.Size]) -> None:
    layer, exact = lora(torch.bfloat16), lora()
    for name in ("lora_A", "lora_B"):
        exact._modules[name]["default"].weight.data = layer._modules[name]["default"].weight.data.float()
    x = X.to(torch.bfloat16)
    expected = results(ordinary, exact, x.float())
    ours, theirs = (results(call, layer, x) for call in (type(layer).forward, ordinary))
    assert steps == [X.shape]
    for own, other, right in zip(ours, theirs, expected, strict=True):
        assert (own.float() - right).norm() <= 1.05 * (other.float() - right).norm()


def test_without_gradients_it_is_one_step_too(steps: list[torch.Size]) -> None:
    layer = lora().eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=1e-5, atol=1e-5)
    assert steps == [X.shape]


def test_dropout_is_off_in_evaluation(steps: list[torch.Size]) -> None:
    layer = lora(lora_dropout=0.5).eval()
    torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=1e-5, atol=1e-5)
    assert steps == [X.shape]


def test_dropout_that_is_off_is_not_called(steps: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda *call: heard.append(call))
    lora(lora_dropout=0.5).eval()(X)
    assert (steps, heard) == ([X.shape], [])


def test_dropout_that_was_left_on_drops_in_evaluation(steps: list[torch.Size]) -> None:
    layer = lora(lora_dropout=0.5).eval()
    layer.lora_dropout.train()
    found, expected = (results(call, layer, X) for call in (type(layer).forward, ordinary))
    close(found, expected)
    assert steps == [X.shape]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_hooks_of_the_dropout_are_called(steps: list[torch.Size], dropout: float) -> None:
    layer = lora(lora_dropout=dropout).eval()
    layer.lora_dropout["default"].register_forward_hook(lambda module, args, out: out * 2)  # noqa: ARG005
    torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=1e-5, atol=1e-5)
    assert steps == [X.shape]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_under_autocast_an_fp32_adapter_computes_in_bf16_as_in_peft(
    steps: list[torch.Size], dtype: torch.dtype
) -> None:
    layer = lora(torch.bfloat16)
    for name in ("lora_A", "lora_B"):
        layer._modules[name].float()
    x = X.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (results(call, layer, x) for call in (type(layer).forward, ordinary))
    assert steps == [X.shape]
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    close(found, expected, 0.01)


def test_under_autocast_fp32_activations_are_no_further_from_fp32_than_in_peft(steps: list[torch.Size]) -> None:
    layer, exact = lora(torch.bfloat16, lora_dropout=0.3), lora(lora_dropout=0.3)
    for name in ("lora_A", "lora_B"):
        layer._modules[name].float()
        exact._modules[name]["default"].weight.data = layer._modules[name]["default"].weight.data
    expected = results(ordinary, exact, X)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (results(call, layer, X) for call in (type(layer).forward, ordinary))
    assert steps == [X.shape]
    for own, other, right in zip(ours, theirs, expected, strict=True):
        assert (own.float() - right).norm() <= 1.05 * (other.float() - right).norm()


def test_checkpointing_changes_nothing(steps: list[torch.Size]) -> None:
    def checkpointed(layer: Any, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    layer = lora(lora_dropout=0.3)
    torch.testing.assert_close(results(checkpointed, layer, X), results(type(layer).forward, layer, X))
    assert len(steps) == 3


def test_second_derivatives_are_those_of_peft(steps: list[torch.Size]) -> None:
    layer = lora()

    def second(call: Callable[[Any, Tensor], Tensor]) -> list[Tensor]:
        x = X.clone().requires_grad_()
        inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        first = torch.autograd.grad(call(layer, x).pow(3).sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs))

    close(second(type(layer).forward), second(ordinary), 1e-5)
    assert steps == [X.shape]


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


class Doubled(torch.nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 2


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
def test_what_is_not_plain_is_left_to_peft(steps: list[torch.Size], change: Callable[[Any], None]) -> None:
    layer = lora(bias=True)
    change(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=0, atol=0)
    assert steps == []


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants_of_lora_are_left_to_peft(steps: list[torch.Size], settings: dict[str, Any]) -> None:
    layer = lora(**settings)
    torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=0, atol=0)
    assert steps == []


@pytest.mark.parametrize("name", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_the_backward_pass_are_called(steps: list[torch.Size], name: str) -> None:
    layer, heard = lora(), []
    getattr(layer.lora_A["default"], name)(lambda module, *grads: heard.append(len(grads)))  # noqa: ARG005
    results(type(layer).forward, layer, X)
    assert len(heard) == 1
    assert steps == []


def test_hooks_of_all_modules_are_called(steps: list[torch.Size]) -> None:
    layer, heard = lora(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: heard.append(module))  # noqa: ARG005
    try:
        type(layer).forward(layer, X)
    finally:
        handle.remove()
    assert layer.lora_A["default"] in heard
    assert steps == []


def test_activations_of_another_class_are_left_to_peft(steps: list[torch.Size]) -> None:
    class Marked(Tensor):
        pass

    layer, x = lora(), X.as_subclass(Marked)
    found = layer(x)
    assert type(found) is type(ordinary(layer, x))
    assert steps == []


@pytest.mark.parametrize(
    ("base", "x"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)], ids=["base", "activations"]
)
def test_other_dtypes_than_that_of_autocast_are_left_to_peft(
    steps: list[torch.Size], base: torch.dtype, x: torch.dtype
) -> None:
    layer = lora(base)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(X.to(x)), ordinary(layer, X.to(x))
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected)
    assert steps == []


def test_factors_of_two_dtypes_fail_as_in_peft(steps: list[torch.Size]) -> None:
    layer = lora()
    layer.lora_B.to(torch.bfloat16)
    for call in (type(layer).forward, ordinary):
        with pytest.raises(RuntimeError, match="dtype"):
            call(layer, X)
    assert steps == []


@pytest.mark.parametrize("training", [False, True])
def test_a_dropout_of_ones_own_is_called(steps: list[torch.Size], training: bool) -> None:
    layer = lora(lora_dropout=0.5).train(training)
    layer.lora_dropout["default"] = Doubled()
    torch.testing.assert_close(layer(X), ordinary(layer, X), rtol=1e-5, atol=1e-5)
    assert steps == [X.shape]


def test_adapters_chosen_by_row_are_left_to_peft(steps: list[torch.Size]) -> None:
    layer = lora().eval()
    found = layer(X, adapter_names=["default", "__base__"])
    torch.testing.assert_close(found[0], ordinary(layer, X)[0])
    torch.testing.assert_close(found[1], layer.base_layer(X)[1])
    assert steps == []


def test_arguments_that_the_layer_does_not_take_are_refused_as_in_peft() -> None:
    with pytest.raises(TypeError):
        lora()(X, 1)


def test_transforms_of_torch_func_differentiate_what_peft_computes(steps: list[torch.Size]) -> None:
    layer = lora()
    with torch.no_grad():
        _, found = torch.func.jvp(layer, (X,), (torch.ones_like(X),))
        _, expected = torch.func.jvp(lambda x: ordinary(layer, x), (X,), (torch.ones_like(X),))
    torch.testing.assert_close(found, expected)
    assert steps == []


def test_a_weight_that_a_wrapper_replaced_gets_its_scales_back(steps: list[torch.Size]) -> None:
    layer = lora()
    expected = results(ordinary, layer, X)
    layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight.data, requires_grad=False)
    close(results(type(layer).forward, layer, X), expected)
    assert steps == [X.shape]


def test_a_weight_that_was_never_quantized_is_the_layers_own_error(steps: list[torch.Size]) -> None:
    layer = lora()
    layer.base_layer = Linear4bit(64, 48, bias=False, compute_dtype=torch.float32)
    for call in (type(layer).forward, ordinary):
        with pytest.raises(QuantStateMissingError, match="Linear4bit was called before its weight was quantized"):
            call(layer, X)
    assert steps == []


def test_a_single_row_without_a_batch_has_second_derivatives() -> None:
    layer, row = lora(), X[0, 0]
    for_all = lambda call: torch.autograd.functional.hessian(lambda x: call(layer, x).pow(3).sum(), row)  # noqa: E731
    torch.testing.assert_close(for_all(type(layer).forward), for_all(ordinary))


def test_a_second_import_extends_no_further() -> None:
    layer = type(lora())
    before = layer.forward
    peft_lora.extend()
    assert layer.forward is before


def test_a_compiled_layer_is_one_graph(steps: list[torch.Size]) -> None:
    layer = lora()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), ordinary(layer, X))
    assert steps == []


def test_modes_hear_every_op(steps: list[torch.Size]) -> None:
    layer = lora()
    expected = layer(X)
    with Listener():
        torch.testing.assert_close(layer(X), expected)
    assert len(steps) == 2


def test_copies_are_extended_with_their_class(steps: list[torch.Size]) -> None:
    layer = lora()
    torch.testing.assert_close(copy.deepcopy(layer)(X), layer(X), rtol=0, atol=0)
    assert len(steps) == 2
