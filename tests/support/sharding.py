"""What the installed torch can shard."""

from __future__ import annotations

import torch
from packaging.version import Version

__all__ = ["FULLY_SHARDED"]

FULLY_SHARDED = "uint8" if Version(Version(torch.__version__).base_version) >= Version("2.13") else "float32"
"""``bnb_4bit_quant_storage`` under ``fully_shard``: no integers before (seen in 2.11; pytorch/pytorch#177844)."""
