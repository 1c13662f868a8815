"""Paged optimizers of the QLoRA recipe."""

import bitsandbytes as bnb
import torch
from bitsandbytes.optim import AdamW32bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit, PagedLion

torch.manual_seed(0)
for kind in (PagedAdamW, PagedAdamW32bit, PagedAdamW8bit, PagedLion, bnb.optim.PagedAdam8bit, bnb.optim.PagedLion8bit):
    model = torch.nn.Linear(512, 512)
    reference = AdamW32bit(torch.nn.Linear(512, 512).parameters())
    optimizer = kind(model.parameters(), lr=1e-3)
    assert isinstance(optimizer, torch.optim.Optimizer)
    x, y = torch.randn(64, 512), torch.randn(64, 512)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], (kind, losses)
    assert optimizer.is_paged
    assert not reference.is_paged
    assert "bitsandbytes" in str(type(optimizer))
print("right")
