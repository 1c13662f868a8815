"""What the installed torch can shard."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version

__all__ = ["SHARDS_BYTES", "needs_bytes_sharded"]

SHARDS_BYTES = Version(Version(torch.__version__).base_version) >= Version("2.13")
"""Whether ``fully_shard`` takes integer parameters. 2.8 and 2.11 refuse them (pytorch/pytorch#177844)."""

needs_bytes_sharded = pytest.mark.skipif(not SHARDS_BYTES, reason="fully_shard takes bytes from torch 2.13 on")
