"""The old order of arguments: memory_efficient_backward stood before the threshold."""
# error: hint: name what follows: Linear8bitLt(..., threshold=6.0)

import bitsandbytes as bnb

bnb.nn.Linear8bitLt(64, 64, True, False, False, 6.0)
