"""Reads, with bitsandbytes, the layers that halfbyte wrote; run by test_peer_reads_ours.py.

    python read_with_peer.py WRITTEN.safetensors RESULT.safetensors

For every ``<case>:weight`` and its ``<case>:weight.*`` it writes the dequantized weight, the layer's output for
``<case>:x`` and the state dict that bitsandbytes makes of the layer.
"""

from __future__ import annotations

import sys

import bitsandbytes as bnb
import torch
from safetensors.torch import load_file, save_file


def read(case: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One layer."""
    saved = {key.removeprefix(f"{case}:"): value for key, value in tensors.items() if key.startswith(f"{case}:")}
    x = saved.pop("x")
    rows, columns = saved["bias"].numel(), x.shape[-1]
    layer = bnb.nn.Linear4bit(columns, rows, compute_dtype=x.dtype, device="meta")
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        data=saved["weight"],
        quantized_stats={key: value for key, value in saved.items() if key.startswith("weight.")},
        requires_grad=False,
        device="cpu",
        module=layer,
    )
    layer.bias = torch.nn.Parameter(saved["bias"])
    layer.train()  # its evaluation path repacks the weight in place on some CPUs
    again = {f"{case}:again.{key}": value.clone() for key, value in layer.state_dict().items()}
    values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return {f"{case}:values": values.contiguous(), f"{case}:output": layer(x).detach().contiguous(), **again}


def main() -> None:
    """Read every case of the first file into the second."""
    tensors = load_file(sys.argv[1])
    results: dict[str, torch.Tensor] = {}
    for case in sorted({key.split(":")[0] for key in tensors}):
        results |= read(case, tensors)
    save_file(results, sys.argv[2])


if __name__ == "__main__":
    main()
