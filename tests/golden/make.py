"""Writes the golden files: run it with an interpreter that has bitsandbytes 0.50.2 on a CPU.

    python tests/golden/make.py

Tensors go to ``*.safetensors`` beside this script, what is no tensor (key orders, scalars, versions) to
``manifest.json``. Inputs are stored too, so that the tests need neither bitsandbytes nor its random numbers.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.backends.default.ops as bnb_default
import bitsandbytes.functional as F
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORAGES = {"uint8": torch.uint8, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LENGTHS = (1, 2, 63, 64, 65, 4097)

Tensors = dict[str, torch.Tensor]
Manifest = dict[str, Any]


def _find_plain() -> Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]:
    # The kernel is a nameless function that only torch's dispatcher holds, and on a CPU the library's comes before it.
    for found in gc.get_objects():
        if not issubclass(type(found), FunctionType) or found.__code__.co_filename != bnb_default.__file__:
            continue
        lines = Path(bnb_default.__file__).read_text().splitlines()
        if "::quantize_blockwise" in lines[found.__code__.co_firstlineno - 1]:
            return found
    raise SystemExit("bitsandbytes' pure torch quantize_blockwise was not found: is this 0.50.2?")


plain_quantize_blockwise = _find_plain()


def values() -> Tensors:
    """Weights as models have them (a scale per row), a heavy tail, and every hard case by its name."""
    torch.manual_seed(50)
    rows = torch.randn(33, 252) * torch.rand(33, 1).mul(3).sub(4).exp()
    weights = rows.flatten()[:8229].contiguous()
    heavy = (torch.randn(4097) * 2).exp() * torch.randn(4097).sign()
    # Scales all alike but for two: what is left of them without the mean is tiny beside the largest.
    sizes = torch.cat([torch.tensor([2.0, 0.0]), 1 + 2e-5 * torch.randn(298)])
    outliers = torch.nn.functional.normalize(torch.randn(300, 32), p=float("inf"), dim=1).mul(sizes[:, None]).flatten()
    tiny_tail = torch.cat([torch.randn(64), torch.tensor([1e-39, -1e-40, 2e-39])])
    zeros = torch.cat([torch.zeros(64), torch.randn(64), torch.zeros(64)])
    fp4_small = torch.cat([torch.ones(1), torch.tensor([1e-3, -1e-3, 2e-3, -2e-3, 0.0, -0.0, 2.7e-3, -2.7e-3])])
    fp4_ties = torch.tensor([1.0, 0.0859375, -0.0859375, 5 / 12, -5 / 12, 0.25, -0.25, -0.2, 0.2])
    return {
        "weights": weights,
        "heavy": heavy,
        "outliers": outliers,
        "tiny_tail": tiny_tail,
        "zeros": zeros,
        "fp4_small": fp4_small,
        "fp4_ties": fp4_ties,
    }


def four_bit(inputs: Tensors, manifest: Manifest) -> Tensors:
    """Packed bytes and absmax by type, blocksize and dtype; then lengths, storages and hard cases."""
    out: Tensors = {}
    for kind in ("nf4", "fp4"):
        for blocksize in BLOCKSIZES:
            for name, dtype in DTYPES.items():
                A = inputs["weights"].to(dtype)
                packed, state = F.quantize_4bit(A, blocksize=blocksize, quant_type=kind)
                out[f"{kind}.{blocksize}.{name}.packed"] = packed
                out[f"{kind}.{blocksize}.{name}.absmax"] = state.absmax
        for length in LENGTHS:
            packed, state = F.quantize_4bit(inputs["heavy"][:length], blocksize=64, quant_type=kind)
            out[f"{kind}.length{length}.packed"] = packed
            out[f"{kind}.length{length}.absmax"] = state.absmax
        for name, storage in STORAGES.items():
            packed, _ = F.quantize_4bit(inputs["weights"][:4096], quant_type=kind, quant_storage=storage)
            out[f"{kind}.storage_{name}.packed"] = packed.view(torch.uint8)
            manifest["storage_rows"][name] = packed.shape[0]
        for name in ("tiny_tail", "zeros", "fp4_small", "fp4_ties"):
            packed, state = F.quantize_4bit(inputs[name], blocksize=64, quant_type=kind)
            out[f"{kind}.{name}.packed"] = packed
            out[f"{kind}.{name}.absmax"] = state.absmax
        for name, dtype in DTYPES.items():
            packed, state = F.quantize_4bit(inputs["weights"][:4095].to(dtype), blocksize=128, quant_type=kind)
            out[f"{kind}.dequantized_{name}.packed"] = packed
            out[f"{kind}.dequantized_{name}.absmax"] = state.absmax
            out[f"{kind}.dequantized_{name}.values"] = F.dequantize_4bit(packed, state)
        out[f"{kind}.code"] = F.get_4bit_type(kind, device="cpu")
    return out


def nested(inputs: Tensors) -> Tensors:
    """Double quantization: the mean, and the 8-bit codes as the CPU library and as plain torch make them."""
    out: Tensors = {}
    cases = [("weights", kind, blocksize) for kind in ("nf4", "fp4") for blocksize in (32, 64, 256)]
    for source, kind, blocksize in [*cases, ("outliers", "nf4", 32)]:
        key = f"{source}.{kind}.{blocksize}"
        A = inputs[source]
        packed, state = F.quantize_4bit(A, blocksize=blocksize, quant_type=kind, compress_statistics=True)
        _, flat = F.quantize_4bit(A, blocksize=blocksize, quant_type=kind)
        plain, absmax2 = plain_quantize_blockwise(flat.absmax - state.offset, state.state2.code, 256)
        out[f"{key}.packed"] = packed
        out[f"{key}.absmax"] = flat.absmax
        out[f"{key}.offset"] = state.offset.reshape(1)
        out[f"{key}.native_codes"] = state.absmax
        out[f"{key}.plain_codes"] = plain
        out[f"{key}.absmax2"] = state.state2.absmax
        out[f"{key}.values"] = F.dequantize_4bit(packed, state)
        assert torch.equal(absmax2, state.state2.absmax)
    return out


def blockwise(inputs: Tensors) -> Tensors:
    """8-bit codes by plain torch (nearest) and by the CPU library (a lookup table of 65 536 bins)."""
    out: Tensors = {}
    maps = {"dynamic": F.create_dynamic_map(), "unsigned": F.create_dynamic_map(signed=False)}
    for name, code in maps.items():
        for blocksize in (64, 256, 1000, 4096):
            for dtype_name, dtype in DTYPES.items():
                A = inputs["heavy"].to(dtype)
                key = f"{name}.{blocksize}.{dtype_name}"
                codes, absmax = plain_quantize_blockwise(A, code, blocksize)
                out[f"{key}.plain_codes"], out[f"{key}.absmax"] = codes, absmax
                native, state = F.quantize_blockwise(A, code=code, blocksize=blocksize)
                out[f"{key}.native_codes"] = native
                if dtype_name != "fp32":
                    continue
                out[f"{key}.values"] = F.dequantize_blockwise(
                    codes, F.QuantState(absmax, None, code, blocksize, None, dtype)
                )
                assert torch.equal(absmax, state.absmax)
    return out


def maps() -> Tensors:
    """Every code map that can be asked for."""
    found = {
        "dynamic.signed": F.create_dynamic_map(),
        "dynamic.unsigned": F.create_dynamic_map(signed=False),
        "normal.extra": F.create_normal_map(),
        "normal.symmetric": F.create_normal_map(use_extra_value=False),
        "linear.signed": F.create_linear_map(),
        "linear.unsigned": F.create_linear_map(signed=False),
        "linear.no_zero": F.create_linear_map(add_zero=False),
    }
    for bits in range(3, 8):
        found[f"dynamic.signed.{bits}"] = F.create_dynamic_map(True, bits - 1, bits)
        found[f"linear.signed.{bits}"] = F.create_linear_map(True, bits)
    for exponent, precision in ((5, 2), (4, 3), (3, 4), (2, 5)):
        found[f"fp8.e{exponent}m{precision}"] = F.create_fp8_map(True, exponent, precision)
    found["fp8.unsigned"] = F.create_fp8_map(False, 5, 3)
    found["nf4"], found["fp4"] = (F.get_4bit_type(kind, device="cpu") for kind in ("nf4", "fp4"))
    found["af4"] = F.get_4bit_type("af4", device="cpu")
    return found


def dicts(inputs: Tensors, manifest: Manifest) -> Tensors:
    """``QuantState.as_dict`` and ``Linear4bit.state_dict``: tensors, key order, scalars, JSON bytes."""
    out: Tensors = {}
    weight = inputs["weights"][: 32 * 128].view(32, 128)
    for kind in ("nf4", "fp4"):
        for is_nested in (False, True):
            for name, dtype in DTYPES.items():
                _, state = F.quantize_4bit(weight.to(dtype), quant_type=kind, compress_statistics=is_nested)
                key = f"as_dict.{kind}.{'nested' if is_nested else 'flat'}.{name}"
                loose, packed = state.as_dict(), state.as_dict(packed=True)
                manifest["dicts"][key] = {
                    "keys": list(loose),
                    "packed_keys": list(packed),
                    "scalars": {k: v for k, v in loose.items() if not isinstance(v, torch.Tensor)},
                }
                out |= {f"{key}.{k}": v.clone() for k, v in packed.items()}
            for name, storage in STORAGES.items():
                layer = bnb.nn.Linear4bit(
                    128,
                    32,
                    compute_dtype=torch.float32,
                    compress_statistics=is_nested,
                    quant_type=kind,
                    quant_storage=storage,
                )
                layer.weight.data = weight.clone()
                layer.bias.data = inputs["weights"][-32:].clone()
                found = layer.to("cpu").state_dict()
                key = f"layer.{kind}.{'nested' if is_nested else 'flat'}.{name}"
                manifest["layers"][key] = list(found)
                x = inputs["heavy"][: 3 * 128].view(3, 128)
                out[f"{key}:output"] = layer(x).detach()
                out |= {f"{key}:{k}": v.clone() for k, v in found.items()}
    return out


def main() -> None:
    """Write everything."""
    manifest: Manifest = {
        "bitsandbytes": bnb.__version__,
        "torch": torch.__version__,
        "storage_rows": {},
        "dicts": {},
        "layers": {},
    }
    inputs = values()
    files = {
        "inputs": inputs,
        "four_bit": four_bit(inputs, manifest),
        "nested": nested(inputs),
        "blockwise": blockwise(inputs),
        "maps": maps(),
        "dicts": dicts(inputs, manifest),
    }
    for name, tensors in files.items():
        path = HERE / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        path.chmod(0o644)
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    total = sum(path.stat().st_size for path in HERE.glob("*.safetensors"))
    print(f"{len(files)} files, {total} bytes, bitsandbytes {bnb.__version__}")


if __name__ == "__main__":
    main()
