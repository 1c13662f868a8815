"""A 0.43 recipe: load half-precision weights into int8 layers, quantized by the move to the device."""

import bitsandbytes as bnb
import torch

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
dense = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).half()
int8_model = torch.nn.Sequential(
    bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0),
    bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0),
)
int8_model.load_state_dict(dense.state_dict())
int8_model = int8_model.to(device)
assert int8_model[0].weight.dtype == torch.int8
x = torch.randn(8, 64, dtype=torch.float16, device=device)
expected = dense.float().to(device)(x.float())
found = int8_model(x)
assert found.dtype == torch.float16
assert (found.float() - expected).norm() / expected.norm() < 0.03
weights = int8_model[0].weight.CB.float() * int8_model[0].weight.SCB.view(-1, 1) / 127
assert (weights - dense[0].weight.to(device)).abs().max() < 0.01

state = bnb.MatmulLtState()
state.threshold, state.has_fp16_weights = 6.0, False
w = torch.randn(32, 64, dtype=torch.float16, device=device)
product = bnb.matmul(x, w, state=state)
assert (product.float() - x.float() @ w.float().t()).norm() / product.float().norm() < 0.03
assert state.CxB is None
print("right")
