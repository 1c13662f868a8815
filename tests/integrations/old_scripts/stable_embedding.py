"""NLP recipe of the documentation: StableEmbedding instead of torch.nn.Embedding, AdamW8bit for everything."""

import bitsandbytes as bnb
import torch

torch.manual_seed(0)
embedding = bnb.nn.StableEmbedding(num_embeddings=1000, embedding_dim=128, padding_idx=0)
head = torch.nn.Linear(128, 1000)
optimizer = bnb.optim.AdamW8bit([*embedding.parameters(), *head.parameters()], lr=1e-2)
tokens = torch.randint(1, 1000, (64, 8))
losses = []
for _ in range(30):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(head(embedding(tokens)).flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0], losses
assert optimizer.state[embedding.weight]["state1"].dtype == torch.float32  # its states stay in 32 bits
assert optimizer.state[head.weight]["state1"].dtype == torch.uint8
assert torch.equal(embedding.weight[0], torch.zeros(128))
rows = embedding(tokens)
assert rows.mean(-1).abs().max() < 0.2
print("right")
