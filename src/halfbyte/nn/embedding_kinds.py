"""Quantized tables in the place of plain embedding layers, and of subclasses that add to their forward pass."""

from __future__ import annotations

import copy
import dis
import functools
import itertools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import UnsupportedError

__all__ = ["QuantizedTable", "class_for", "take_over", "why_not"]

_FACTS = "_table_facts"
_FACTS_READ = {"dtype", "device"}


class QuantizedTable(torch.nn.Module):
    """What quantized tables do alike; stands before the class that holds their codes."""

    num_embeddings: int
    embedding_dim: int
    dtype: torch.dtype
    """Of what a look-up returns."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # Codes keep their dtype; what a look-up returns follows the model it feeds.
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def weight_shape(self) -> tuple[int, int]:
        """Shape of the table before it was quantized."""
        return self.num_embeddings, self.embedding_dim


def why_not(kind: type[torch.nn.Embedding]) -> str | None:
    """Why a layer of that class cannot be quantized; None where it can.

    A subclass may scale, normalise or mask what ``super().forward`` returns, and ask for its table's dtype or device;
    one that reads the table itself would find codes there.

    >>> why_not(torch.nn.Embedding) is None
    True
    """
    for one in kind.__mro__[: kind.__mro__.index(torch.nn.Embedding)]:
        code = getattr(vars(one).get("forward"), "__code__", None)
        if code is not None and _reads_table(code):
            return f"{kind.__name__} reads its table itself"
    return None


def _reads_table(code: CodeType) -> bool:
    steps = list(dis.get_instructions(code))
    after = itertools.pairwise(steps)
    return any(step.argval == "weight" and following.argval not in _FACTS_READ for step, following in after)


def class_for(base: type[Any], kind: type[torch.nn.Embedding]) -> type[Any]:
    """The quantized class that stands for ``kind``: ``base`` itself, or ``base`` with ``kind``'s forward around it.

    Raises:
        UnsupportedError: ``kind`` reads its table itself.
    """
    reason = why_not(kind)
    if reason is not None:
        raise UnsupportedError(reason, expected="a class that leaves the look-up to torch.nn.Embedding")
    return base if kind is torch.nn.Embedding else _around(base, kind)


@functools.cache
def _around(base: type[Any], kind: type[torch.nn.Embedding]) -> type[Any]:
    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:  # noqa: N807 - pickle finds no module attribute
        del protocol
        return _remake, (base, kind), dict(vars(self))

    def facts(self: Any) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.weight.device)

    own = {"__reduce_ex__": __reduce_ex__, "plain": kind, _FACTS: property(facts)}
    forward = next(vars(one)["forward"] for one in kind.__mro__ if "forward" in vars(one))
    if "weight" in forward.__code__.co_names:
        # Codes have a dtype of their own: what the forward pass asks of its table is answered for the values.
        names = tuple(_FACTS if name == "weight" else name for name in forward.__code__.co_names)
        code = forward.__code__.replace(co_names=names)
        own["forward"] = FunctionType(
            code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
        )
    return type(f"{base.__name__}{kind.__name__}", (kind, base), own)


def _remake(base: type[Any], kind: type[torch.nn.Embedding]) -> Any:
    made = object.__new__(class_for(base, kind))
    torch.nn.Module.__init__(made)
    return made


def take_over(base: type[Any], embedding: torch.nn.Embedding, hold: Callable[[Any], None]) -> Any:
    """A layer of :func:`class_for` with every attribute of ``embedding`` but its table, which ``hold`` sets.

    Raises:
        UnsupportedError: A layer that reads its table itself, or changes it (``max_norm``).
    """
    if embedding.max_norm is not None:
        raise UnsupportedError(
            f"an embedding with max_norm={embedding.max_norm} changes its table in each look-up",
            expected="max_norm=None",
        )
    made = _remake(base, type(embedding))
    copied = {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(embedding).items()}
    vars(made).update(copied)
    del made._parameters["weight"]
    hold(made)
    return made
