"""Former functions of bitsandbytes compute or refuse as they did; FP8 and SwitchBack layers by their values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import halfbyte.functional as F
from halfbyte.errors import ArgumentError
from halfbyte.integrations.bitsandbytes import legacy, research
from tests.support.parametrized import double


def test_codes_without_a_scale_are_the_nearest_of_the_map() -> None:
    code = F.create_dynamic_map()
    values = torch.linspace(-0.5, 0.5, 301)
    codes = legacy.quantize_no_absmax(values, code)
    distance = (legacy.dequantize_no_absmax(codes, code) - values).abs()
    assert torch.equal(distance, (code[None] - values[:, None]).abs().amin(1))


def test_a_quantile_map_reaches_one_and_holds_zero() -> None:
    made = legacy.create_quantile_map(torch.randn(5000) * 3)
    assert made.abs().max() == 1.0
    assert 0.0 in made
    assert torch.equal(made, made.sort().values)


def test_paged_memory_knows_its_device_and_other_memory_is_refused() -> None:
    assert vars(legacy.get_paged(2, device=3)) == {"is_paged": True, "page_deviceid": 3}
    with pytest.raises(ArgumentError, match="not paged"):
        legacy.prefetch_tensor(torch.zeros(1))


def test_elementwise_functions_work_in_place() -> None:
    a = torch.empty(2, 3)
    legacy.elementwise_func("arange", a, None, 0)
    assert a.tolist() == [[0, 1, 2], [3, 4, 5]]
    legacy._mul(a, a)
    assert a.tolist() == [[0, 1, 4], [9, 16, 25]]
    with pytest.raises(ArgumentError, match="func_name is 'sin'"):
        legacy.elementwise_func("sin", a, None, 0)


def test_tensors_on_several_devices_are_not_on_one_gpu() -> None:
    with pytest.raises(ArgumentError, match="cpu"):
        legacy.is_on_gpu([torch.zeros(1)])
    meta, other = torch.zeros(1, device="meta"), torch.zeros(1, device="cpu")
    with pytest.raises(ArgumentError, match="cpu, meta"):
        legacy.is_on_gpu([meta, other, None])
    assert legacy.is_on_gpu([meta, None])


def test_products_that_do_not_fit_are_refused() -> None:
    a, b = torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3, 4, dtype=torch.int8)
    assert legacy.check_matmul(a, b, None, False, False) == (2, 4)
    for bad in ((a, b, None, True, False), (a, b.int(), None, False, False), (a, b, torch.empty(3, 4), False, False)):
        with pytest.raises(ArgumentError):
            legacy.check_matmul(*bad)


def rounded(A: torch.Tensor, exponent: int, precision: int) -> torch.Tensor:
    code = F.create_fp8_map(True, exponent, precision, 8)
    scale = A.abs().max()
    return code[((A / scale).flatten()[:, None] - code[None]).abs().argmin(1)].view(A.shape) * scale


@pytest.mark.parametrize("kind", [research.LinearFP8Mixed, research.LinearFP8Global])
def test_fp8_layers_round_forward_to_e4m3_and_gradients_to_e5m2(kind: Any) -> None:
    torch.manual_seed(0)
    layer, x, grad = kind(32, 16, bias=False), torch.randn(5, 32, requires_grad=True), torch.randn(5, 16)
    y = layer(x)
    y.backward(grad)
    weight, values = rounded(layer.weight.detach(), 4, 3), rounded(x.detach(), 4, 3)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y, values @ weight.t(), **close)
    torch.testing.assert_close(x.grad, rounded(grad, 5, 2) @ weight, **close)
    of_weight = grad.t() @ x.detach() if layer.mixed else rounded(grad, 5, 2).t() @ values
    torch.testing.assert_close(layer.weight.grad, of_weight, **close)


def test_fp8_layers_add_a_bias_that_stands_behind_a_parametrization() -> None:
    layer, x = research.LinearFP8Mixed(32, 16), torch.randn(5, 32)
    plain, bias = layer(x), layer.bias.detach().clone()
    double(layer, "bias")
    torch.testing.assert_close(layer(x), plain + bias)


def test_a_prepared_layer_keeps_the_codes_it_was_prepared_with() -> None:
    layer, x = research.SwitchBackLinear(64, 32).eval(), torch.randn(3, 64)
    layer.prepare_for_eval()
    before = layer(x)
    layer.weight.data.zero_()
    assert torch.equal(layer(x), before)
    layer.prepare_for_eval()
    assert not torch.equal(layer(x), before)


def test_the_threshold_keeps_outliers_out_of_int8() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 64)
    x[:, 3] = 60.0
    layer = research.SwitchBackLinearBnb(64, 32, threshold=6.0)
    exact = torch.nn.functional.linear(x, layer.weight, layer.bias)
    error = (layer(x) - exact).norm()
    layer.threshold = 0.0
    assert error < 0.2 * (layer(x) - exact).norm()
