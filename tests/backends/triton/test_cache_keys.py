"""Keys of compiled kernels: the same whatever a process used first."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from halfbyte.backends.triton import cache_keys, launch
from halfbyte.backends.triton.fused import fused_kernels
from halfbyte.backends.triton.kernels.gemm_portable import _sum_partial_kernel
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


def test_callees_are_looked_into_before_their_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Versions of Triton whose keys have no order by themselves would not tell.
    kernel = fused_kernels()["register"]
    owner = next(kind for kind in type(kernel).__mro__ if "cache_key" in vars(kind))
    key, started = vars(owner)["cache_key"], list[str]()

    def note(function: Any) -> str:
        started.append(function.fn.__name__)
        return key.fget(function)

    monkeypatch.setattr(owner, "cache_key", property(note))
    monkeypatch.setattr(cache_keys, "_settled", {})
    cache_keys.settle(kernel)
    first = [started.index(name) for name in ("_accumulate", "_multiply", "_gemm_4bit_small_batch_kernel")]
    assert first == sorted(first)


def test_both_ways_to_launch_settle_the_kernels_key_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_keys, "_settled", {})
    settled: list[bool] = []

    def run(kernel: JITFunction[Any], *_: Any, **__: Any) -> None:
        settled.append(id(kernel) in cache_keys._settled)

    monkeypatch.setattr(JITFunction, "run", run)
    launch.start(_sum_partial_kernel, (1,))
    cache_keys._settled.clear()
    launch.Launcher(_sum_partial_kernel, ()).ordinary((1, 1, 1))
    assert settled == [True, True]
