"""The 8-bit, 32-bit and paged forms of an optimizer class, made from it instead of written out."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar, cast

from halfbyte.errors import ArgumentError
from halfbyte.optim.base import Optimizer8bit

__all__ = ["variant"]

C = TypeVar("C", bound=Optimizer8bit)


def variant(
    base: type[C],
    name: str,
    module: str,
    *,
    without: tuple[str, ...] = (),
    only: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
    **fixed: Any,
) -> type[C]:
    """A subclass of ``base`` called ``name``, with some arguments fixed.

    Args:
        base: The class whose signature it has.
        name: As in ``"Adam8bit"``.
        module: Where it is defined: the caller's ``__name__``.
        without: Arguments that its signature lacks.
        only: Argument -> the one value that it may have (kept in the signature for compatibility).
        defaults: Argument -> another default.
        fixed: Argument of ``base`` -> the value that it gets.
    """
    full = inspect.signature(base.__init__)
    kept = [
        parameter.replace(default=(defaults or {}).get(parameter.name, parameter.default))
        for parameter in full.parameters.values()
        if parameter.name not in without
    ]
    signature = full.replace(parameters=kept)
    allowed = only or {}

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        del given["self"]
        extra = given.pop("options", {})
        for argument, value in allowed.items():
            if given[argument] != value:
                raise ArgumentError(
                    f"{type(self).__name__} does not support {argument}={given[argument]!r}", expected=repr(value)
                )
        base.__init__(self, **{**given, **fixed}, **extra)

    __init__.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    __init__.__doc__ = base.__init__.__doc__
    differs = {**{f"default {key}": value for key, value in (defaults or {}).items()}, **fixed}
    doc = f"{base.__name__} with {', '.join(f'{key}={value!r}' for key, value in differs.items())}."
    body = {"__init__": __init__, "__doc__": doc, "__module__": module, "__qualname__": name}
    return cast("type[C]", type(base)(name, (base,), body))
