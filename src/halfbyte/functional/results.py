"""Results into tensors that the caller made."""

from __future__ import annotations

import math

from torch import Tensor

from halfbyte.ops.arguments import check_out

__all__ = ["into"]


def into(given: Tensor | None, made: Tensor) -> Tensor:
    """``made``, or ``given`` filled with it.

    Raises:
        ArgumentError: ``given`` has another number of elements.
    """
    if given is None:
        return made
    if math.prod(given.shape) != made.numel():
        check_out(given, made.dtype, tuple(made.shape), made.device)
    return given.copy_(made.view(given.shape))
