"""AdamW, in all its forms."""

from __future__ import annotations

from halfbyte.optim.adam import Adam
from halfbyte.optim.variants import variant

__all__ = ["AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"]

_PAGED = ("is_paged",)

AdamW = variant(Adam, "AdamW", __name__, defaults={"weight_decay": 1e-2})
AdamW8bit = variant(AdamW, "AdamW8bit", __name__, only={"optim_bits": 32}, optim_bits=8)
AdamW32bit = variant(AdamW, "AdamW32bit", __name__, optim_bits=32)
PagedAdamW = variant(AdamW, "PagedAdamW", __name__, without=_PAGED, is_paged=True)
PagedAdamW8bit = variant(
    AdamW, "PagedAdamW8bit", __name__, without=_PAGED, only={"optim_bits": 32}, optim_bits=8, is_paged=True
)
PagedAdamW32bit = variant(AdamW, "PagedAdamW32bit", __name__, without=_PAGED, optim_bits=32, is_paged=True)
