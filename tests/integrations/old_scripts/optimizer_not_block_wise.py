"""8-bit states without blocks are gone."""
# error: block_wise=False; expected True

import bitsandbytes as bnb
import torch

bnb.optim.Adam8bit([torch.nn.Parameter(torch.zeros(8192))], block_wise=False)
