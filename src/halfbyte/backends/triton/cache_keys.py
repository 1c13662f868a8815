"""Keys of compiled kernels in Triton's cache, made the same in every process.

A kernel's key covers the constants that its callees read. Triton 3.6 collects them from a callee before it has looked
into it, so a key depends on which kernel a process happens to use first: what one process compiled, another, which
decodes before it reads a prompt, does not find. With every callee looked into before its callers, all have the same.
"""

from __future__ import annotations

from typing import Any

__all__ = ["settle"]

_settled: dict[int, Any] = {}
"""Functions by their identity: they have no cheaper hash."""


def settle(kernel: Any) -> None:
    """Compute the keys of a ``triton.jit`` or ``gluon.jit`` function and of all that it calls, callees first."""
    if id(kernel) in _settled:
        return
    _settled[id(kernel)] = kernel
    function = getattr(kernel, "fn", None)
    if function is None or not hasattr(type(kernel), "cache_key"):  # Triton's interpreter has none
        return
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if hasattr(value, "fn") and hasattr(type(value), "cache_key"):
            settle(value)
    _ = kernel.cache_key
