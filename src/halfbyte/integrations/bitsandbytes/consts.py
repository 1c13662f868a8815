"""``bitsandbytes.consts``: the constants that other code reads from there."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["DYNAMIC_LIBRARY_SUFFIX", "NONPYTORCH_DOC_URL", "PACKAGE_DIR", "PACKAGE_GITHUB_URL"]

DYNAMIC_LIBRARY_SUFFIX = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")
"""Suffix of shared libraries here; halfbyte has none of its own."""

PACKAGE_DIR = Path(__file__).parents[2]
"""Folder of the halfbyte package."""

PACKAGE_GITHUB_URL = "https://github.com/bitsandbytes-foundation/bitsandbytes"
NONPYTORCH_DOC_URL = "https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/docs/source/nonpytorchcuda.mdx"
