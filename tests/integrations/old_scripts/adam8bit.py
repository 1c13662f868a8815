"""The README's first step of that time: exchange the optimizer; clip by percentile; keep one weight in 32 bits."""

import bitsandbytes as bnb
import torch

torch.manual_seed(0)
mng = bnb.optim.GlobalOptimManager.get_instance()
model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128))
mng.register_parameters(model.parameters())  # register while still on the CPU
mng.override_config(model[0].weight, "optim_bits", 32)
adam = bnb.optim.Adam8bit(
    model.parameters(), lr=1e-3, betas=(0.9, 0.995), percentile_clipping=50, block_wise=True, min_8bit_size=4096
)
x, y = torch.randn(256, 128), torch.randn(256, 128)
losses = []
for _ in range(80):
    adam.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    adam.step()
    losses.append(loss.item())
assert losses[-1] < 0.7 * losses[0], (losses[0], losses[-1])
assert adam.state[model[0].weight]["state1"].dtype == torch.float32
assert adam.state[model[2].weight]["state1"].dtype == torch.uint8

other = bnb.optim.Adam8bit(model.parameters(), lr=1e-3)
other.load_state_dict(adam.state_dict())
assert other.state[model[2].weight]["state1"].dtype == torch.uint8
for kind in (bnb.optim.AdamW, bnb.optim.Lion8bit, bnb.optim.RMSprop8bit, bnb.optim.Adagrad32bit):
    kind(model.parameters(), lr=1e-4).step()
print("right")
