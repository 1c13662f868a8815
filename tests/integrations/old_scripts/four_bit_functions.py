"""Tensors by bitsandbytes.functional in 4 bits, and the layer around them, as QLoRA scripts of that time did it."""

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
A = torch.randn(256, 128, device=device, dtype=torch.float16)
for kind, most in (("nf4", 0.073), ("fp4", 0.097)):
    packed, state = F.quantize_4bit(A, blocksize=64, quant_type=kind, compress_statistics=True)
    assert packed.shape == (256 * 128 // 2, 1)
    assert state.shape == A.shape
    assert state.nested
    assert state[1] == A.shape
    assert (F.dequantize_4bit(packed, state).float() - A.float()).abs().mean() < most
    x = torch.randn(1, 128, device=device, dtype=torch.float16)
    exact = x.float() @ F.dequantize_4bit(packed, state).float().t()
    for product in (
        F.gemv_4bit(x, packed.t(), state=state),
        bnb.matmul_4bit(x, packed.t(), state),
        bnb.matmul_4bit(x, packed.t(), quant_state=state),
    ):
        assert (product.float() - exact).norm() / exact.norm() < 5e-3
    again = F.QuantState.from_dict(state.as_dict(packed=True), device=torch.device(device))
    assert torch.equal(F.dequantize_4bit(packed, again), F.dequantize_4bit(packed, state))
assert F.get_4bit_type("nf4", device="cpu").tolist()[0] == -1.0
packed, state = F.quantize_nf4(A)
assert torch.equal(F.dequantize_nf4(packed, state), F.dequantize_4bit(packed, state, quant_type="nf4"))

linear = bnb.nn.LinearNF4(128, 64, bias=False, compute_dtype=torch.float32).to(device)
assert isinstance(linear.weight, bnb.nn.Params4bit)
y = linear(torch.randn(3, 128, device=device, requires_grad=True))
y.sum().backward()
assert linear.weight.quant_state.quant_type == "nf4"
print("right")
