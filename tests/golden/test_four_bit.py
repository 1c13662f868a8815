"""Packed bytes and absmax against those that bitsandbytes wrote."""

import pytest
import torch

import halfbyte.functional as F
from tests.support.golden import DTYPES, STORAGES, golden, manifest, nibbles

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LENGTHS = (1, 2, 63, 64, 65, 4097)
FP4_FIRST_MIDPOINT = 0.0625 / 12 / 2


def quantized(name: str, kind: str, **named: object) -> tuple[torch.Tensor, F.QuantState]:
    return F.quantize_4bit(golden("inputs")[name], quant_type=kind, **named)


def scaled(values: torch.Tensor, absmax: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Values over the absmax of their block, in float64."""
    return values.double() / absmax.double().repeat_interleave(blocksize)[: values.numel()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_nf4_bytes_are_equal(blocksize: int, dtype: str) -> None:
    A = golden("inputs")["weights"].to(DTYPES[dtype])
    packed, state = F.quantize_4bit(A, blocksize=blocksize, quant_type="nf4")
    assert torch.equal(packed, golden("four_bit")[f"nf4.{blocksize}.{dtype}.packed"])
    assert torch.equal(state.absmax, golden("four_bit")[f"nf4.{blocksize}.{dtype}.absmax"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_fp4_bytes_differ_only_in_the_sign_of_zero(blocksize: int, dtype: str) -> None:
    A = golden("inputs")["weights"].to(DTYPES[dtype])
    packed, state = F.quantize_4bit(A, blocksize=blocksize, quant_type="fp4")
    theirs = nibbles(golden("four_bit")[f"fp4.{blocksize}.{dtype}.packed"])[: A.numel()]
    ours = nibbles(packed)[: A.numel()]
    assert torch.equal(state.absmax, golden("four_bit")[f"fp4.{blocksize}.{dtype}.absmax"])
    relative = scaled(A, state.absmax, blocksize)
    in_zero_bin = relative.abs() <= FP4_FIRST_MIDPOINT
    differ = ours != theirs
    assert not (differ & ~in_zero_bin).any()
    assert set(theirs[differ].tolist()) <= {0, 8}
    # bitsandbytes' own CUDA kernel sets the sign bit for negative values, and so do we.
    zero = (ours & 7) == 0
    assert torch.equal(ours[zero] == 8, A[zero] < 0)
    assert differ.any()


@pytest.mark.parametrize("length", LENGTHS)
def test_nf4_tails_are_equal(length: int) -> None:
    packed, state = F.quantize_4bit(golden("inputs")["heavy"][:length], blocksize=64, quant_type="nf4")
    assert torch.equal(packed, golden("four_bit")[f"nf4.length{length}.packed"])
    assert torch.equal(state.absmax, golden("four_bit")[f"nf4.length{length}.absmax"])


@pytest.mark.parametrize("length", LENGTHS)
def test_fp4_tails_differ_only_in_the_sign_of_zero(length: int) -> None:
    packed, state = F.quantize_4bit(golden("inputs")["heavy"][:length], blocksize=64, quant_type="fp4")
    theirs = golden("four_bit")[f"fp4.length{length}.packed"]
    assert packed.shape == theirs.shape
    ours, theirs = nibbles(packed), nibbles(theirs)
    assert set(ours[ours != theirs].tolist()) <= {0, 8}
    assert torch.equal(ours & 7, theirs & 7)
    assert torch.equal(state.absmax, golden("four_bit")[f"fp4.length{length}.absmax"])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_storage_shows_the_same_bytes(kind: str, storage: str) -> None:
    A = golden("inputs")["weights"][:4096]
    packed, _ = F.quantize_4bit(A, quant_type=kind, quant_storage=STORAGES[storage])
    theirs = golden("four_bit")[f"{kind}.storage_{storage}.packed"]
    assert packed.dtype == STORAGES[storage]
    assert packed.shape == (manifest()["storage_rows"][storage], 1)
    mask = 15 if kind == "nf4" else 7
    assert torch.equal(nibbles(packed) & mask, nibbles(theirs) & mask)
    assert torch.equal(packed.view(torch.uint8).flatten(), F.quantize_4bit(A, quant_type=kind)[0].flatten())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_short_last_block_of_tiny_values_is_scaled_by_its_own_absmax(kind: str) -> None:
    # bitsandbytes stores absmax 1e-38 for it: all values of the block come back wrong.
    A = golden("inputs")["tiny_tail"]
    packed, state = quantized("tiny_tail", kind)
    theirs = golden("four_bit")[f"{kind}.tiny_tail.packed"]
    absmax = golden("four_bit")[f"{kind}.tiny_tail.absmax"]
    mask = 15 if kind == "nf4" else 7
    assert torch.equal(nibbles(packed)[:64] & mask, nibbles(theirs)[:64] & mask)
    assert state.absmax[0] == absmax[0]
    assert absmax[1] == torch.tensor(1e-38)
    assert state.absmax[1] == A[64:].abs().max()
    # Ours is nearest: brute force over all levels, in float64.
    levels = F.get_4bit_type(kind, "cpu").double()
    distance = (scaled(A[64:], state.absmax[1:], 64)[:, None] - levels).abs()
    chosen = distance.gather(1, nibbles(packed)[64 : A.numel(), None].long()).squeeze(1)
    assert torch.equal(chosen, distance.min(dim=1).values)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_zero_blocks_are_zero_codes_and_zero_values(kind: str) -> None:
    packed, state = quantized("zeros", kind)
    assert torch.equal(state.absmax, golden("four_bit")[f"{kind}.zeros.absmax"])
    mask = 15 if kind == "nf4" else 7
    assert torch.equal(nibbles(packed) & mask, nibbles(golden("four_bit")[f"{kind}.zeros.packed"]) & mask)
    values = F.dequantize_4bit(packed, state)
    assert torch.equal(values[:64], torch.zeros(64))
    assert torch.equal(values[128:], torch.zeros(64))


def test_fp4_ties_take_the_lower_value_as_theirs_do() -> None:
    A = golden("inputs")["fp4_ties"]
    ours = nibbles(quantized("fp4_ties", "fp4")[0])[: A.numel()]
    assert ours[A.abs() == 0.0859375].tolist() == [1, 14]
    assert torch.equal(ours, nibbles(golden("four_bit")["fp4.fp4_ties.packed"])[: A.numel()])


def test_fp4_values_near_zero_keep_their_sign_bit() -> None:
    A = golden("inputs")["fp4_small"]
    ours = nibbles(quantized("fp4_small", "fp4")[0])[: A.numel()]
    theirs = nibbles(golden("four_bit")["fp4.fp4_small.packed"])[: A.numel()]
    assert ours.tolist() == [3, 0, 8, 0, 8, 0, 0, 1, 9]
    assert theirs.tolist() == [3, 8, 0, 8, 0, 0, 0, 1, 9]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_their_bytes_dequantize_to_their_values(kind: str, dtype: str) -> None:
    # Their CPU library gives wrong scales where rows are no multiple of the block (AVX-512); this is a flat vector.
    file, key = golden("four_bit"), f"{kind}.dequantized_{dtype}"
    state = F.QuantState(file[f"{key}.absmax"], torch.Size([4095]), file[f"{kind}.code"], 128, kind, DTYPES[dtype])
    assert torch.equal(F.dequantize_4bit(file[f"{key}.packed"], state), file[f"{key}.values"])
