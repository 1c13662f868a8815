"""How every op is defined: a schema, a check of its arguments, a fake result; one kernel that asks the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from halfbyte.errors import UnsupportedError

__all__ = ["NAMESPACE", "bind", "define", "defined_ops"]

NAMESPACE = "halfbyte"

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_CHECKS: dict[str, Callable[..., None]] = {}
_bound = False


def define(schema: str, *, check: Callable[..., None], result: Callable[..., Any]) -> None:
    """Define ``halfbyte::<schema>``.

    Args:
        schema: The op's schema without its namespace, as torch.library takes it.
        check: Same arguments; refuses those that no backend could take. Sees shapes and dtypes, never values.
        result: Same arguments, checked; returns empty outputs. With ``check`` it is the op's fake.
    """
    name = schema.split("(", 1)[0]

    def fake(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return result(*args, **kwargs)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    _CHECKS[name] = check


def defined_ops() -> tuple[str, ...]:
    """Names of all ops, overloads as ``name.out``, sorted."""
    return tuple(sorted(_CHECKS))


def bind(kernel_for: Callable[[str, Callable[..., None]], Callable[..., Any]]) -> None:
    """Give every op the kernel that ``kernel_for(name, check)`` returns, on every device. The registry calls this once.

    Raises:
        UnsupportedError: Bound already.
    """
    global _bound
    if _bound:
        raise UnsupportedError("the ops have their kernels already")
    _bound = True
    for name, check in _CHECKS.items():
        _LIBRARY.impl(name, kernel_for(name, check), "CompositeExplicitAutograd")
