"""Writes the golden files of LLM.int8(): run it with an interpreter that has bitsandbytes 0.50.2 on a CPU.

    python tests/golden/int8/make.py

Inputs are stored too, so that the tests need neither bitsandbytes nor its random numbers.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
THRESHOLD = 6.0
N, K = 72, 320


def inputs() -> dict[str, torch.Tensor]:
    """A weight with rows of different sizes, one of them zero, and activations with outliers in a few columns.

    All are fp16 numbers: bitsandbytes casts to fp16, so that others would not be the same inputs.
    """
    torch.manual_seed(50)
    weight = (torch.randn(N, K) * torch.rand(N, 1).mul(3).sub(4).exp()).half()
    weight[11] = 0
    x = torch.randn(9, K)
    x[:, [3, 100, 101]] *= 8
    x[4] = 0
    return {"weight": weight, "x": x.half().float(), "bias": torch.randn(N).half().float()}


def main() -> None:
    assert bnb.__version__ == "0.50.2"
    out = dict(given := inputs())
    for name, dtype in DTYPES.items():
        A = given["x"].to(dtype)
        for rows in (1, 9):
            codes, stats, columns = F.int8_vectorwise_quant(A[:rows].clone(), threshold=THRESHOLD)
            key = f"quant.{name}.{rows}"
            out[f"{key}.codes"], out[f"{key}.stats"], out[f"{key}.columns"] = codes, stats, columns
        codes, stats, _ = F.int8_vectorwise_quant(A.clone())
        out[f"quant.{name}.plain.codes"], out[f"quant.{name}.plain.stats"] = codes, stats
    CB, SCB, _ = F.int8_vectorwise_quant(given["weight"].clone())
    out["weight.codes"], out["weight.stats"], out["weight.values"] = CB, SCB, F.int8_vectorwise_dequant(CB, SCB)
    CA, SCA, columns = F.int8_vectorwise_quant(given["x"].half(), threshold=THRESHOLD)
    sums = F.int8_linear_matmul(CA, CB)
    out["sums"] = sums
    out["mm_dequant"] = F.int8_mm_dequant(sums, SCA, SCB, bias=given["bias"].half())
    op = torch.ops.bitsandbytes
    for name, dtype in DTYPES.items():
        A, bias = given["x"].to(dtype), given["bias"].to(dtype)
        out[f"scaled.{name}"] = op.int8_scaled_mm(CA, CB, SCA, SCB, bias, dtype)
        mixed, apart = op.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, columns, bias)
        out[f"mixed.{name}"], out[f"mixed.{name}.apart"] = mixed, apart
    for threshold in (0.0, THRESHOLD):
        layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=threshold)
        layer.load_state_dict({"weight": given["weight"], "bias": given["bias"]})
        layer = layer.to("cpu").eval()
        for name, dtype in DTYPES.items():
            layer.bias.data = given["bias"].clone()  # it is cast in place by each dtype
            for rows in (1, 9):
                out[f"layer.{threshold:g}.{name}.{rows}"] = layer(given["x"][:rows].to(dtype).clone()).detach()
    layer.bias.data = given["bias"].clone()
    for key, value in layer.state_dict().items():
        out[f"state.{key}"] = value
    x = given["x"].clone().requires_grad_()
    layer.train()(x).backward(torch.ones(9, N))
    out["grad"] = x.grad
    large = (given["x"] * 1e6).bfloat16()
    layer.state.threshold = 0.0
    out["large"], out["large.layer"] = large, layer.eval()(large.clone())
    long = torch.full((1, 8191), 127, dtype=torch.int8)
    long[0, 0] = 1
    out["long.sums"] = F.int8_linear_matmul(long, long)
    save_file({key: value.detach().clone().contiguous() for key, value in out.items()}, HERE / "int8.safetensors")


if __name__ == "__main__":
    main()
