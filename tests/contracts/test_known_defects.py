"""Defects of bitsandbytes 0.50.2 on CPUs, each under its number in docs/compatibility.md: here it is right."""

import io

import pytest
import torch

import halfbyte.functional as F
from halfbyte.nn import Linear4bit, LinearNF4, Params4bit
from tests.reference import textbook
from tests.support.hard_inputs import DTYPES, weights
from tests.support.tolerances import rounding, worst


def test_1_evaluation_does_not_change_the_layer() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), LinearNF4(64, 96, compute_dtype=torch.float32)).to("cpu")
    x = torch.randn(2, 64)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    values = F.dequantize_4bit(model[1].weight.data, model[1].weight.quant_state)
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).pow(2).sum().backward()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.norm() > 0
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert torch.equal(F.dequantize_4bit(model[1].weight.data, model[1].weight.quant_state), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [64, 256, 2048, 4096])
@pytest.mark.parametrize("columns", [16, 48, 80, 272])
def test_2_rows_that_are_no_multiple_of_the_block_dequantize_with_their_own_scales(
    columns: int, blocksize: int, dtype: torch.dtype
) -> None:
    A = weights(33 * columns).view(33, columns)
    packed, state = F.quantize_4bit(A.to(dtype), blocksize=blocksize, quant_type="nf4")
    codes = textbook.unpack(packed.numpy().tobytes(), A.numel())
    exact = torch.from_numpy(textbook.decode(codes, state.absmax.double().numpy(), blocksize, textbook.NF4))
    values = F.dequantize_4bit(packed, state)
    size = exact.abs().clamp(min=float(torch.finfo(dtype).smallest_normal))
    assert worst(values.flatten(), exact, size) <= rounding(dtype).relative


def test_3_8bit_codes_are_nearest_and_zero_stays_zero() -> None:
    A = torch.cat([torch.ones(1), torch.logspace(-9, -1, 200), torch.zeros(1)])
    codes, state = F.quantize_blockwise(A, blocksize=256)
    truth = textbook.nearest(A.double().numpy(), 256, textbook.dynamic(signed=True))
    assert truth.excess(codes.long().numpy()).max() <= 3e-7
    assert F.dequantize_blockwise(codes, state)[-1] == 0.0


def test_7_int4_levels_can_be_asked_for() -> None:
    assert F.get_4bit_type("int4", device="cpu").tolist()[:3] == [0.0, pytest.approx(1 / 7), pytest.approx(2 / 7)]


def test_9_out_is_filled_on_the_cpu() -> None:
    packed, state = F.quantize_4bit(weights(8 * 64).view(8, 64), quant_type="nf4")
    values = torch.zeros(8, 64)
    F.dequantize_4bit(packed, state, out=values)
    assert torch.equal(values, F.dequantize_4bit(packed, state))
    codes, state8 = F.quantize_blockwise(weights(100))
    values8 = torch.zeros(100)
    F.dequantize_blockwise(codes, state8, out=values8)
    assert torch.equal(values8, F.dequantize_blockwise(codes, state8))
    x, y = torch.randn(1, 64), torch.zeros(1, 8)
    F.gemv_4bit(x, packed, out=y, state=state)
    assert torch.equal(y, F.gemv_4bit(x, packed, state=state))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("moved", [True, False])
def test_10_a_quantized_state_dict_loads_into_fresh_and_quantized_layers(moved: bool, strict: bool) -> None:
    source = LinearNF4(64, 32, compute_dtype=torch.float32).to("cpu")
    target = LinearNF4(64, 32, compute_dtype=torch.float32)
    target = target.to("cpu") if moved else target
    target.load_state_dict(source.state_dict(), strict=strict)
    x = torch.randn(2, 64)
    assert torch.equal(target(x), source(x))


def test_15_a_saved_module_comes_back_with_its_parameter_class() -> None:
    buffer = io.BytesIO()
    torch.save(LinearNF4(64, 32).to("cpu"), buffer)
    buffer.seek(0)
    layer = torch.load(buffer, weights_only=False)
    assert type(layer.weight) is Params4bit
    assert layer.weight.quant_state is layer.quant_state


def test_17_neither_the_bias_nor_the_callers_dictionary_is_changed() -> None:
    layer = Linear4bit(64, 32).to("cpu")
    layer(torch.randn(1, 64, dtype=torch.float16))
    assert layer.bias.dtype == torch.float32
    stats = layer.weight.quant_state.as_dict(packed=True)
    keys = list(stats)
    F.QuantState.from_dict(stats, "cpu")
    assert list(stats) == keys
