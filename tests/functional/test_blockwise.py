"""functional's 8-bit blockwise names."""

import pytest
import torch

import halfbyte.functional as F
from halfbyte.errors import ArgumentError
from tests.support.hard_inputs import DTYPES, weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(0,), (1,), (5000,), (7, 9, 11)])
def test_values_come_back_in_their_shape_and_dtype(shape: tuple[int, ...], nested: bool, dtype: torch.dtype) -> None:
    A = weights(int(torch.Size(shape).numel()), dtype).view(shape)
    codes, state = F.quantize_blockwise(A, blocksize=256, nested=nested)
    values = F.dequantize_blockwise(codes, state)
    assert (codes.shape, codes.dtype) == (A.shape, torch.uint8)
    assert (values.shape, values.dtype) == (A.shape, dtype)
    largest = float(A.float().abs().max()) if A.numel() else 0.0
    # The widest gap of the dynamic map is 0.014 of absmax, so a value is off by half of it, plus the scale's own error.
    assert ((values.float() - A.float()).abs() <= 0.02 * largest).all()


def test_the_default_map_is_the_signed_dynamic_one_and_is_kept() -> None:
    _, state = F.quantize_blockwise(torch.randn(10))
    assert state.code is not None
    assert torch.equal(state.code, F.create_dynamic_map())
    assert torch.equal(F.name2qmap["dynamic"], state.code)
    assert state.blocksize == 4096


def test_with_absmax_alone_the_result_is_fp32() -> None:
    codes, state = F.quantize_blockwise(weights(100, torch.float16), blocksize=64)
    values = F.dequantize_blockwise(codes, absmax=state.absmax, blocksize=64)
    assert values.dtype == torch.float32
    assert torch.equal(values.half(), F.dequantize_blockwise(codes, state))


def test_out_and_absmax_are_filled_and_returned() -> None:
    A = weights(1000)
    codes, state = F.quantize_blockwise(A, blocksize=64)
    out, absmax, values = torch.zeros(1000, dtype=torch.uint8), torch.zeros(16), torch.zeros(1000)
    given, filled = F.quantize_blockwise(A, absmax=absmax, out=out, blocksize=64)
    assert given is out
    assert filled.absmax is absmax
    assert torch.equal(out, codes)
    assert torch.equal(absmax, state.absmax)
    only, _ = F.quantize_blockwise(A, out=torch.zeros(1000, dtype=torch.uint8), blocksize=64)
    assert torch.equal(only, codes)
    assert F.dequantize_blockwise(codes, state, out=values) is values
    assert torch.equal(values, F.dequantize_blockwise(codes, state))


def test_nested_scales_use_the_same_blocksize_twice() -> None:
    _, state = F.quantize_blockwise(weights(64 * 100), blocksize=64, nested=True)
    assert state.nested
    assert state.state2 is not None
    assert state.state2.blocksize == 64
    assert state.absmax.shape == (100,)
    assert state.state2.absmax.shape == (2,)


def test_neither_state_nor_absmax_is_refused() -> None:
    with pytest.raises(ArgumentError, match="neither quant_state nor absmax; expected one of them"):
        F.dequantize_blockwise(torch.zeros(4, dtype=torch.uint8))


def test_an_out_of_another_size_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"out is torch.uint8 \(5,\)"):
        F.quantize_blockwise(torch.randn(10), out=torch.zeros(5, dtype=torch.uint8))


def test_a_tensor_that_wants_gradients_leaves_none_in_its_state() -> None:
    _, state = F.quantize_blockwise(torch.randn(100, requires_grad=True), nested=True)
    assert not any(tensor.requires_grad for tensor in state.tensors())
