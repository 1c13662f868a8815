"""functional's 4-bit names: bitsandbytes' signatures, defaults and shapes."""

import copy
import inspect
import math

import pytest
import torch

import halfbyte.functional as F
from halfbyte.errors import ArgumentError, HalfbyteError, QuantStateMissingError
from tests.support.hard_inputs import DTYPES, weights

SIGNATURES = {
    "quantize_4bit": "(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_type='fp4', "
    "quant_storage=torch.uint8)",
    "quantize_fp4": "(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8)",
    "quantize_nf4": "(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8)",
    "dequantize_4bit": "(A, quant_state=None, absmax=None, out=None, blocksize=None, quant_type='fp4')",
    "dequantize_fp4": "(A, quant_state=None, absmax=None, out=None, blocksize=None)",
    "dequantize_nf4": "(A, quant_state=None, absmax=None, out=None, blocksize=None)",
    "gemv_4bit": "(A, B, out=None, transposed_A=False, transposed_B=False, state=None)",
    "quantize_blockwise": "(A, code=None, absmax=None, out=None, blocksize=4096, nested=False)",
    "dequantize_blockwise": "(A, quant_state=None, absmax=None, code=None, out=None, blocksize=4096, nested=False)",
    "create_dynamic_map": "(signed=True, max_exponent_bits=7, total_bits=8)",
    "create_linear_map": "(signed=True, total_bits=8, add_zero=True)",
    "create_fp8_map": "(signed=True, exponent_bits=5, precision_bits=2, total_bits=8)",
    "create_normal_map": "(offset=0.9677083, use_extra_value=True)",
    "get_4bit_type": "(typename, device=None, blocksize=64)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_bitsandbytes(name: str) -> None:
    signature = inspect.signature(getattr(F, name))
    plain = signature.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    assert str(plain) == SIGNATURES[name]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_typed_names_are_the_general_one_with_a_type(kind: str) -> None:
    A = weights(200)
    packed, state = getattr(F, f"quantize_{kind}")(A, blocksize=128, compress_statistics=True)
    again, expected = F.quantize_4bit(A, blocksize=128, compress_statistics=True, quant_type=kind)
    assert torch.equal(packed, again)
    assert state == expected
    assert torch.equal(getattr(F, f"dequantize_{kind}")(packed, state), F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (200,), (3, 5, 7), (32, 64), (2, 0, 3)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_come_back_in_their_shape_and_dtype(dtype: torch.dtype, nested: bool, shape: tuple[int, ...]) -> None:
    A = weights(math.prod(shape), dtype).view(shape)
    packed, state = F.quantize_4bit(A, compress_statistics=nested, quant_type="nf4")
    values = F.dequantize_4bit(packed, state)
    assert values.shape == A.shape
    assert values.dtype == dtype


def test_a_vector_comes_back_as_a_vector() -> None:
    # bitsandbytes' CPU library returns (1, n) where n is a multiple of the block.
    assert F.dequantize_4bit(*F.quantize_4bit(torch.randn(256))).shape == (256,)


def test_a_transposed_weight_comes_back_transposed() -> None:
    A = weights(32 * 64).view(32, 64)
    packed, state = F.quantize_4bit(A)
    assert torch.equal(F.dequantize_4bit(packed.t(), state), F.dequantize_4bit(packed, state).t())


def test_out_and_absmax_are_filled_and_returned() -> None:
    A = weights(300)
    packed, state = F.quantize_4bit(A, quant_type="nf4")
    out, absmax = torch.zeros(150, 1, dtype=torch.uint8), torch.zeros(5)
    given, filled = F.quantize_4bit(A, absmax=absmax, out=out, quant_type="nf4")
    assert given is out
    assert filled.absmax is absmax
    assert torch.equal(out, packed)
    assert torch.equal(absmax, state.absmax)
    values = torch.zeros(300)
    assert F.dequantize_4bit(packed, state, out=values) is values
    assert torch.equal(values, F.dequantize_4bit(packed, state))


def test_dequantizing_by_absmax_and_out_alone() -> None:
    A = weights(300)
    packed, state = F.quantize_4bit(A, blocksize=32, quant_type="nf4")
    out = torch.zeros(300)
    F.dequantize_4bit(packed, absmax=state.absmax, out=out, blocksize=32, quant_type="nf4")
    assert torch.equal(out, F.dequantize_4bit(packed, state))
    with pytest.raises(ArgumentError, match="no quant_state; expected quant_state, or absmax and out"):
        F.dequantize_4bit(packed, absmax=state.absmax)


@pytest.mark.parametrize("nested", [False, True])
def test_gemv_multiplies_with_the_levels_of_the_state(nested: bool) -> None:
    packed, state = F.quantize_4bit(weights(8 * 64).view(8, 64), quant_type="nf4", compress_statistics=nested)
    x = torch.randn(1, 64)
    y = F.gemv_4bit(x, packed, state=state)
    assert torch.allclose(y, x @ F.dequantize_4bit(packed, state).t(), atol=1e-5)
    out = torch.zeros(1, 8)
    assert F.gemv_4bit(x, packed, out=out, state=state) is out
    assert torch.equal(out, y)
    assert state.code is not None
    state.code = state.code * 2
    if not nested:
        assert torch.allclose(F.gemv_4bit(x, packed, state=state), 2 * y, atol=1e-5)


def test_gemv_without_a_state_is_refused() -> None:
    with pytest.raises(QuantStateMissingError, match="gemv_4bit without a state"):
        F.gemv_4bit(torch.randn(1, 64), torch.zeros(32, 1, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "af4"])
def test_every_4bit_type_has_sixteen_levels_up_to_one(name: str) -> None:
    # bitsandbytes fails for int4: it divides integers in place.
    levels = F.get_4bit_type(name, device="cpu")
    assert (levels.shape, levels.dtype) == ((16,), torch.float32)
    assert levels.abs().max() == 1.0
    assert levels.data_ptr() != F.get_4bit_type(name, device="cpu").data_ptr()


def test_int4_levels_are_sevenths() -> None:
    assert torch.equal(F.get_4bit_type("int4", "cpu")[:8], torch.arange(8) / 7)


def test_af4_is_known_for_its_blocksize_only() -> None:
    with pytest.raises(ArgumentError, match="af4 with blocksize 32; expected 64"):
        F.get_4bit_type("af4", "cpu", blocksize=32)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"blocksize": 100}, "blocksize is 100"),
        ({"quant_type": "int8"}, "'int8' is unknown"),
        ({"quant_storage": torch.int16}, "quant_storage is torch.int16"),
    ],
)
def test_wrong_settings_are_value_errors(named: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        F.quantize_4bit(torch.randn(64), **named)
    assert isinstance(caught.value, HalfbyteError)


def test_the_state_of_another_tensor_is_refused() -> None:
    packed, _ = F.quantize_4bit(torch.randn(64, 64))
    _, other = F.quantize_4bit(torch.randn(64, 32))
    with pytest.raises(ArgumentError, match=r"holds 2048 bytes; expected 1024 for 2048 values\nhint: .*another tensor"):
        F.dequantize_4bit(packed, other)


def test_a_state_with_less_than_it_needs_is_refused() -> None:
    packed, state = F.quantize_4bit(torch.randn(64, 64))
    state.shape = None
    with pytest.raises(QuantStateMissingError, match="incomplete quant_state"):
        F.dequantize_4bit(packed, state)


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_that_wants_gradients_leaves_none_in_its_state(nested: bool) -> None:
    A = torch.randn(64, 64, requires_grad=True)
    packed, state = F.quantize_4bit(A, compress_statistics=nested)
    assert not any(tensor.requires_grad for tensor in [packed, *state.tensors()])
    assert copy.deepcopy(state) == state
