"""SwitchBack and simulated FP8, from bitsandbytes.research and the layers beside it."""

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from bitsandbytes.nn import StandardLinear, SwitchBackLinear, SwitchBackLinearBnb
from bitsandbytes.research.nn import LinearFP8Global, LinearFP8Mixed

torch.manual_seed(0)
x, y = torch.randn(128, 64), torch.randn(128, 16)
final = {}
for kind in (StandardLinear, SwitchBackLinear, SwitchBackLinearBnb, LinearFP8Mixed, LinearFP8Global):
    torch.manual_seed(1)
    layer = kind(64, 16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(layer(x), y)
        loss.backward()
        optimizer.step()
    final[kind.__name__] = loss.item()
assert all(abs(loss - final["StandardLinear"]) < 0.05 for loss in final.values()), final
w = torch.randn(32, 64)
exact = x @ w.t()
assert (bnb.research.switchback_bnb(x, w) - exact).norm() / exact.norm() < 0.02
code, back = F.create_fp8_map(True, 4, 3, 8), F.create_fp8_map(True, 5, 2, 8)
assert (bnb.research.matmul_fp8_mixed(x, w.t(), code, back) - exact).norm() / exact.norm() < 0.1
print("right")
