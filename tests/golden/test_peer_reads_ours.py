"""bitsandbytes 0.50.2 itself reads what halfbyte writes."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte.functional as F
from halfbyte.nn import Linear4bit
from tests.support.golden import DTYPES, STORAGES
from tests.support.tolerances import close, product

SCRIPT = Path(__file__).parent / "read_with_peer.py"


@pytest.mark.peer
def test_bitsandbytes_reads_our_layers(tmp_path: Path, peer_python: str) -> None:
    written: dict[str, torch.Tensor] = {}
    layers: dict[str, tuple[Linear4bit, torch.Tensor]] = {}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for storage_name, storage in STORAGES.items():
                for dtype_name, dtype in DTYPES.items():
                    layer = Linear4bit(128, 96, True, dtype, nested, kind, storage)
                    layer = layer.to(dtype).to("cpu")
                    x = torch.randn(5, 128, dtype=dtype)
                    case = f"{kind}-{nested}-{storage_name}-{dtype_name}"
                    layers[case] = layer, x
                    written |= {f"{case}:{key}": value.clone() for key, value in layer.state_dict().items()}
                    written[f"{case}:x"] = x
    save_file(written, tmp_path / "ours.safetensors")
    command = [peer_python, "-W", "ignore", str(SCRIPT), "ours.safetensors", "theirs.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "theirs.safetensors")
    for case, (layer, x) in layers.items():
        values = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(theirs[f"{case}:values"], values), case
        for key, value in layer.state_dict().items():
            again = theirs[f"{case}:again.{key}"]
            assert torch.equal(again.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), (case, key)
        with torch.no_grad():
            bound = x.double().abs() @ values.double().abs().t() + layer.bias.double().abs()
            close(case, layer(x), theirs[f"{case}:output"], product(x.dtype), bound)
