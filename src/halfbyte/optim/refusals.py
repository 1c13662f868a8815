"""Arguments that stand in bitsandbytes' signatures and do nothing there: refused here, with the way to have them."""

from __future__ import annotations

from halfbyte.errors import ArgumentError

__all__ = ["refuse", "refuse_amsgrad"]


def refuse(owner: str, argument: str, value: object, expected: object, hint: str) -> None:
    """Refuse ``value`` unless it is the expected one.

    Raises:
        ArgumentError: It is another.
    """
    if value != expected:
        raise ArgumentError(f"{owner} does not support {argument}={value!r}", expected=repr(expected), hint=hint)


def refuse_amsgrad(owner: str, amsgrad: bool) -> None:
    """Refuse ``amsgrad=True``, which needs a third state.

    Raises:
        ArgumentError: It is True.
    """
    refuse(owner, "amsgrad", bool(amsgrad), False, "torch.optim.AdamW(amsgrad=True) has it, in 32 bits")
