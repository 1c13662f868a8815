"""Double quantization against what bitsandbytes wrote."""

import pytest
import torch

import halfbyte.functional as F
from tests.support.golden import golden, nibbles
from tests.support.tolerances import TOLERANCES, close

CASES = [("weights", kind, blocksize) for kind in ("nf4", "fp4") for blocksize in (32, 64, 256)]
CASES.append(("outliers", "nf4", 32))


@pytest.mark.parametrize(("source", "kind", "blocksize"), CASES)
def test_scales_are_equal_to_nearest_codes(source: str, kind: str, blocksize: int) -> None:
    file, key = golden("nested"), f"{source}.{kind}.{blocksize}"
    packed, state = F.quantize_4bit(
        golden("inputs")[source], blocksize=blocksize, quant_type=kind, compress_statistics=True
    )
    mask = 15 if kind == "nf4" else 7
    assert torch.equal(nibbles(packed) & mask, nibbles(file[f"{key}.packed"]) & mask)
    assert state.offset is not None
    assert state.state2 is not None
    assert state.offset.dim() == 0
    offset = file[f"{key}.offset"][0]
    close("offset", state.offset, offset, TOLERANCES["mean of absmax"], offset.abs())
    # From the same mean everything else follows exactly, whatever order this CPU sums in.
    codes, state2 = F.quantize_blockwise(file[f"{key}.absmax"] - offset, blocksize=256)
    assert torch.equal(codes, file[f"{key}.plain_codes"])
    assert torch.equal(state2.absmax, file[f"{key}.absmax2"])
    if torch.equal(state.offset, offset):
        assert torch.equal(state.absmax, codes)
        assert torch.equal(state.state2.absmax, state2.absmax)


def test_their_cpu_library_stores_scales_that_are_not_nearest_and_ours_are() -> None:
    file, key = golden("nested"), "outliers.nf4.32"
    shifted = file[f"{key}.absmax"] - file[f"{key}.offset"]
    scaled = shifted.double() / file[f"{key}.absmax2"].double().repeat_interleave(256)[: shifted.numel()]
    levels = F.create_dynamic_map().double()
    distance = (scaled[:, None] - levels).abs()
    nearest = distance.min(dim=1).values
    of = {
        name: distance.gather(1, file[f"{key}.{name}_codes"].long()[:, None]).squeeze(1) for name in ("native", "plain")
    }
    slack = TOLERANCES["nearest slack"].relative
    assert (of["plain"] - nearest).max() <= slack
    wrong = file[f"{key}.native_codes"] != file[f"{key}.plain_codes"]
    assert wrong.any()
    assert (of["native"] >= of["plain"] - slack)[wrong].all()


@pytest.mark.parametrize(("source", "kind", "blocksize"), CASES)
def test_their_bytes_dequantize_to_their_values(source: str, kind: str, blocksize: int) -> None:
    file, key = golden("nested"), f"{source}.{kind}.{blocksize}"
    dynamic = F.create_dynamic_map()
    state = F.QuantState(
        file[f"{key}.native_codes"],
        golden("inputs")[source].shape,
        F.get_4bit_type(kind, "cpu"),
        blocksize,
        kind,
        torch.float32,
        file[f"{key}.offset"][0],
        F.QuantState(file[f"{key}.absmax2"], None, dynamic, 256, None, torch.float32),
    )
    # Their CPU library returns vectors whose length is a multiple of the block with a dimension too many.
    assert torch.equal(F.dequantize_4bit(file[f"{key}.packed"], state), file[f"{key}.values"].flatten())
