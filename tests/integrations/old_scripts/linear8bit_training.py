"""A 0.43 recipe: int8 linear layers whose weights stay in 16 or 32 bits, trained with outliers in full precision."""

import bitsandbytes as bnb
import torch

torch.manual_seed(0)
model = torch.nn.Sequential(
    bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=True, memory_efficient_backward=False, threshold=6.0),
    torch.nn.ReLU(),
    bnb.nn.Linear8bitLt(128, 8, bias=True, has_fp16_weights=True, threshold=6.0),
)
x, y = torch.randn(64, 64), torch.randn(64, 8)
x[:, 7] *= 20  # an outlier dimension
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
losses = []
for _ in range(60):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.3 * losses[0], losses
assert model[0].weight.dtype == torch.float32
exact = torch.nn.functional.linear(x, model[0].weight, model[0].bias)
assert (model[0](x) - exact).norm() / exact.norm() < 0.02
print("right")
