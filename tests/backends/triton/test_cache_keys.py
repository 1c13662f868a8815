"""Keys of compiled kernels: the same whatever a process used first."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.support.python import python_code

KEYS = """
import warnings
warnings.simplefilter("ignore")
from halfbyte.backends.triton.cache_keys import settle
from halfbyte.backends.triton.fused import fused_kernels
from halfbyte.backends.triton.grouped import fused_kernel
kernels = {**fused_kernels(), "grouped": fused_kernel()}
for name in {order}:
    settle(kernels[name])
print(sorted((name, kernel.cache_key) for name, kernel in kernels.items()))
"""


def test_keys_do_not_depend_on_which_kernel_comes_first() -> None:
    # Triton 3.6 gives these three orders three sets of keys by itself.
    orders = (
        ["register", "staged", "warpgroup", "grouped"],
        ["warpgroup", "staged", "grouped", "register"],
        ["grouped", "register", "staged", "warpgroup"],
    )
    keys = {python_code(KEYS.replace("{order}", repr(order))) for order in orders}
    assert len(keys) == 1
