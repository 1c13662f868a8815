"""Linear4bit: what it computes, in which dtype, with which gradients, and how it is moved about."""

from typing import Any

import pytest
import torch

import halfbyte.functional as F
from halfbyte.errors import ArgumentError, QuantStateMissingError
from halfbyte.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit, fix_4bit_weight_quant_state_from_module
from halfbyte.nn.compute_dtype import default_compute_dtype
from tests.support.hard_inputs import DTYPES, weights
from tests.support.tolerances import close, product, worst

STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def layer_of(bias: bool = True, nested: bool = True, **named: Any) -> Linear4bit:
    named = {"compute_dtype": torch.float32, "quant_type": "nf4", **named}
    layer = Linear4bit(64, 32, bias, compress_statistics=nested, **named)
    layer.weight.data = weights(32 * 64).view(32, 64)
    return layer.to("cpu")


def dense(layer: Linear4bit) -> torch.Tensor:
    """The weight that the codes stand for, in float64."""
    return F.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


# What it computes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_forward_is_the_product_with_the_dequantized_weight(kind: str, nested: bool, dtype: torch.dtype) -> None:
    layer = layer_of(nested=nested, quant_type=kind, compute_dtype=dtype)
    x = torch.randn(2, 3, 64, dtype=dtype)
    y = layer(x)
    W, b = dense(layer), layer.bias.double()
    assert y.dtype == dtype
    close("y", y, x.double() @ W.t() + b, product(dtype), x.double().abs() @ W.abs().t() + b.abs())


def test_fp4_is_the_default_type_as_in_bitsandbytes() -> None:
    assert Linear4bit(64, 8).weight.quant_type == "fp4"
    assert LinearFP4(64, 8).weight.quant_type == "fp4"
    assert LinearNF4(64, 8).weight.quant_type == "nf4"


def test_it_is_a_torch_linear_layer_with_the_attributes_that_others_read() -> None:
    layer = Linear4bit(64, 32, quant_storage=torch.bfloat16)
    assert isinstance(layer, torch.nn.Linear)
    assert (layer.in_features, layer.out_features, layer.quant_storage) == (64, 32, torch.bfloat16)
    assert layer.quant_state is None
    assert layer.weight.module is layer
    assert not layer.weight.requires_grad
    assert type(layer).__name__ == "Linear4bit"
    assert type(layer.weight).__name__ == "Params4bit"


@pytest.mark.parametrize(("out_features", "in_features"), [(33, 63), (1, 1), (5, 100), (32, 4097)])
def test_sizes_that_are_no_multiple_of_anything_work_in_eval_and_train(out_features: int, in_features: int) -> None:
    # bitsandbytes' CPU evaluation path fails for out_features % 32 and in_features % blocksize.
    layer = LinearNF4(in_features, out_features, compute_dtype=torch.float32).to("cpu")
    x = torch.randn(2, in_features)
    W, b = dense(layer), layer.bias.double()
    for mode in (True, False):
        y = layer.train(mode)(x)
        close("y", y, x.double() @ W.t() + b, product(torch.float32), x.double().abs() @ W.abs().t() + b.abs())


def test_an_empty_batch_gives_an_empty_result() -> None:
    assert layer_of()(torch.zeros(0, 64)).shape == (0, 32)


# Compute dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    assert layer_of(compute_dtype=torch.float16)(torch.randn(1, 64, dtype=dtype)).dtype == dtype


def test_a_given_compute_dtype_is_honoured_for_every_input() -> None:
    layer = layer_of(compute_dtype=torch.bfloat16)
    for dtype in DTYPES:
        assert layer.compute_dtype_for(torch.zeros(1, 64, dtype=dtype)) == torch.bfloat16
    exact, rounded = layer_of()(torch.ones(1, 64) * 1.001), layer(torch.ones(1, 64) * 1.001)
    assert not torch.equal(exact, rounded)
    assert torch.equal(rounded, layer((torch.ones(1, 64) * 1.001).bfloat16()).float())


def test_without_one_a_16_bit_input_brings_its_own() -> None:
    layer = layer_of(compute_dtype=None)
    for dtype in (torch.bfloat16, torch.float16):
        assert layer.compute_dtype_for(torch.zeros(1, 64, dtype=dtype)) == dtype


def test_without_one_an_fp32_input_is_computed_in_what_the_device_multiplies_natively() -> None:
    layer = layer_of(compute_dtype=None)
    assert layer.compute_dtype_for(torch.zeros(1, 64)) == default_compute_dtype(torch.device("cpu"))


def test_a_forward_pass_chooses_anew_and_stores_nothing() -> None:
    layer = layer_of(compute_dtype=None)
    layer(torch.randn(1, 64))
    layer(torch.randn(1, 64, dtype=torch.float16))
    assert layer.compute_dtype is None
    assert not layer.compute_type_is_set


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forward_pass_never_changes_the_dtype_of_the_bias(dtype: torch.dtype) -> None:
    layer = layer_of(compute_dtype=None)
    bias = layer.bias
    layer(torch.randn(1, 64, dtype=dtype))
    assert layer.bias is bias
    assert layer.bias.dtype == torch.float32


# Gradients


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
def test_gradients_equal_those_of_the_dense_layer_in_float64(
    shape: tuple[int, ...], dtype: torch.dtype, nested: bool
) -> None:
    layer = layer_of(nested=nested, compute_dtype=dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    W = dense(layer)
    rows = grad.double().reshape(-1, 32)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    close("dx", x.grad, grad.double() @ W, product(dtype), grad.double().abs() @ W.abs())
    assert layer.bias.grad.dtype == torch.float32
    close("dbias", layer.bias.grad, rows.sum(0), product(dtype), rows.abs().sum(0))
    assert layer.weight.grad is None


def test_the_backward_pass_keeps_only_the_codes() -> None:
    layer = layer_of(bias=False)
    x = torch.randn(5, 64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {tensor.dtype for tensor in kept} == {torch.uint8}
    assert sum(tensor.numel() for tensor in kept) == 32 * 64 // 2


def test_second_derivatives_pass_through() -> None:
    layer = layer_of(bias=False)
    W = dense(layer)
    x = torch.randn(5, 64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.pow(2).sum(), x)
    gram = W.t() @ W
    expected = 8 * x.detach().double() @ gram @ gram
    scale = 8 * x.detach().double().abs() @ (W.abs().t() @ W.abs()) @ (W.abs().t() @ W.abs())
    close("ddx", ddx, expected, product(torch.float32), scale)


def test_a_bias_alone_gets_its_gradient() -> None:
    layer = layer_of()
    layer(torch.randn(5, 64)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((32,), 5.0))


def test_eval_and_back_leaves_gradients_codes_and_state_dict_alone() -> None:
    # bitsandbytes repacks the weight at the first evaluation on some CPUs: adapters then get no gradient.
    layer = layer_of()
    adapter = torch.nn.Linear(64, 64)
    x = torch.randn(4, 64)
    before = {key: value.clone() for key, value in layer.state_dict().items()}

    def adapter_gradient() -> torch.Tensor:
        adapter.zero_grad()
        layer(adapter(x)).pow(2).sum().backward()
        return adapter.weight.grad.clone()

    first = adapter_gradient()
    layer.eval()
    with torch.no_grad():
        evaluated = layer(x)
    layer.train()
    assert torch.equal(adapter_gradient(), first)
    assert torch.equal(layer(x), evaluated)
    assert first.abs().sum() > 0
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(bytes_of(after[key]) == bytes_of(before[key]) for key in before)


def test_inference_mode_and_training_give_the_same_values() -> None:
    layer = layer_of()
    x = torch.randn(4, 64)
    with torch.inference_mode():
        inferred = layer(x).clone()
    assert torch.equal(layer(x.requires_grad_()).detach(), inferred)


# Moving about


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "double", "to fp16", "to cpu bf16"])
def test_dtype_conversions_of_a_quantized_layer_never_touch_the_codes(convert: str, storage: torch.dtype) -> None:
    layer = layer_of(quant_storage=storage, compute_dtype=None)
    weight, codes = layer.weight, bytes_of(layer.weight)
    scales = [tensor.clone() for tensor in layer.weight.quant_state.tensors()]
    if convert == "to fp16":
        layer = layer.to(torch.float16)
    elif convert == "to cpu bf16":
        layer = layer.to("cpu", torch.bfloat16)
    else:
        layer = getattr(layer, convert)()
    assert layer.weight is weight
    assert layer.weight.dtype == storage
    assert bytes_of(layer.weight) == codes
    for old, new in zip(scales, layer.weight.quant_state.tensors(), strict=True):
        assert new.dtype == old.dtype
        assert torch.equal(new, old)
    expected = {"half": torch.float16, "to fp16": torch.float16, "float": torch.float32, "double": torch.float64}
    assert layer.bias.dtype == expected.get(convert, torch.bfloat16)


@pytest.mark.parametrize("convert", ["half", "bfloat16"])
def test_an_unquantized_layer_converts_and_quantizes_later(convert: str) -> None:
    layer = getattr(Linear4bit(64, 32, quant_type="nf4"), convert)()
    dtype = layer.bias.dtype
    assert layer.weight.dtype == dtype
    assert layer.weight.quant_state is None
    layer.to("cpu")
    assert layer.weight.quant_state.dtype == dtype
    assert layer.weight.dtype == torch.uint8


def test_a_model_quantizes_all_its_layers_on_one_move_and_nothing_on_the_next() -> None:
    model = torch.nn.Sequential(LinearNF4(64, 64), torch.nn.LayerNorm(64), torch.nn.ModuleList([LinearNF4(64, 8)]))
    model.to("cpu")
    codes = [bytes_of(module.weight) for module in model.modules() if isinstance(module, Linear4bit)]
    parameters = [id(parameter) for parameter in model.parameters()]
    model.to("cpu")
    assert codes == [bytes_of(module.weight) for module in model.modules() if isinstance(module, Linear4bit)]
    assert parameters == [id(parameter) for parameter in model.parameters()]


def test_layer_and_weight_know_the_same_state_after_every_move() -> None:
    layer = layer_of()
    for _ in range(2):
        layer.to("cpu")
        assert layer.quant_state is layer.weight.quant_state
        assert layer.weight.module is layer


def test_a_meta_layer_takes_no_memory_and_shows_its_shape() -> None:
    layer = Linear4bit(64, 32, device="meta")
    assert layer.weight.device.type == "meta"
    assert layer.weight.shape == (32, 64)
    with torch.device("meta"):
        assert Linear4bit(64, 32, True, torch.bfloat16, quant_type="nf4").weight.device.type == "meta"
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_a_meta_layer_becomes_memory_by_to_empty() -> None:
    layer = Linear4bit(64, 32, device="meta", quant_type="nf4").to_empty(device="cpu")
    assert type(layer.weight) is Params4bit
    assert layer.weight.device.type == "cpu"
    assert layer.weight.shape == (32, 64)
    assert layer.weight.module is layer


def test_a_quantized_layer_goes_to_meta_and_back_by_its_state_dict() -> None:
    layer = layer_of()
    saved = {key: value.clone() for key, value in layer.state_dict().items()}
    x = torch.randn(2, 64)
    expected = layer(x)
    ghost = layer.to("meta")
    assert ghost.weight.device.type == "meta"
    ghost.load_state_dict(saved, assign=True)
    assert torch.equal(ghost(x), expected)


def test_set_submodule_replaces_a_dense_layer_in_place() -> None:
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(64, 32)))
    old = model.get_submodule("0.0")
    with torch.device("meta"):
        new = Linear4bit(64, 32, True, torch.float32, quant_type="nf4")
    new.source_cls = type(old)
    new.requires_grad_(False)
    model.set_submodule("0.0", new)
    new.weight = Params4bit(old.weight.data, requires_grad=False, **new.weight.__dict__).to("cpu")
    new.bias = torch.nn.Parameter(old.bias.data, requires_grad=False)
    assert new.weight.quant_state is new.quant_state
    x = torch.randn(2, 64)
    assert worst(model(x), old(x).detach(), old(x).detach().abs().max()) < 0.5
    assert model[0][0] is new


def test_tied_layers_stay_tied_through_moves() -> None:
    model = torch.nn.Sequential(LinearNF4(64, 64, bias=False), LinearNF4(64, 64, bias=False))
    model[1].weight = model[0].weight
    model.to("cpu").to("cpu").half()
    assert model[0].weight is model[1].weight
    assert model[1](torch.randn(1, 64)).shape == (1, 64)


# What is refused


def test_a_layer_that_was_never_moved_says_what_to_do() -> None:
    with pytest.raises(QuantStateMissingError, match=r"before its weight was quantized.*\n?.*layer\.to"):
        Linear4bit(64, 32)(torch.randn(1, 64))


def test_the_quant_state_of_another_layer_is_refused() -> None:
    layer, other = layer_of(), LinearNF4(64, 48).to("cpu")
    layer.weight.quant_state = other.weight.quant_state
    with pytest.raises(ArgumentError, match=r"holds 1024 bytes; expected 1536.*\n.*belongs to another tensor"):
        layer(torch.randn(1, 64))


def test_an_input_of_another_width_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"\(2, 65\) times weight of shape \(32, 64\)"):
        layer_of()(torch.randn(2, 65))


# Sharding


def test_a_parameter_that_lost_class_and_state_gets_them_back_from_the_layer() -> None:
    layer = layer_of()
    x = torch.randn(2, 64)
    expected = layer(x)
    layer.weight = torch.nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    assert torch.equal(layer(x), expected)
    assert type(layer.weight) is Params4bit
    assert layer.weight.quant_state is layer.quant_state
    assert layer.weight.module is layer


def test_a_parameter_that_lost_its_state_gets_it_back_from_the_layer() -> None:
    layer = layer_of()
    layer.weight.quant_state = None
    fix_4bit_weight_quant_state_from_module(layer)
    assert layer.weight.quant_state is layer.quant_state
    assert layer.weight.bnb_quantized


def test_a_recovered_parameter_is_not_quantized_again() -> None:
    layer = layer_of(quant_storage=torch.bfloat16)
    codes = bytes_of(layer.weight)
    layer.weight = torch.nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    layer(torch.randn(1, 64))
    layer.to("cpu").half()
    assert bytes_of(layer.weight) == codes
