"""A codebook: which value each code stands for, and what follows from it (order, midpoints, the zero code)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from halfbyte.errors import ArgumentError

__all__ = ["Codebook", "codebook", "codebook_names", "register"]

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Codebook:
    """The values that codes ``0 .. 2**bits - 1`` stand for, relative to the block's absmax.

    A value on a midpoint takes the lower level, in every codebook. With ``sign_bit`` set (FP4) the other bits hold the
    magnitude, and midpoints lie between magnitudes: there a negative value on one takes the larger magnitude. The sign
    bit is set exactly for values below zero, so the second zero ("minus zero") takes those that round to zero.

    Attributes:
        name: What ``quant_type`` calls it.
        bits: Bits a code takes.
        levels: fp32 values in code order, ``2**bits`` of them.
        source: Paper or file the numbers come from.
        sign_bit: The bit that holds the sign, where the format has one.
    """

    name: str
    bits: int
    levels: tuple[float, ...]
    source: str
    sign_bit: int | None = None

    def __post_init__(self) -> None:
        if len(self.levels) != 1 << self.bits:
            raise ArgumentError(f"codebook {self.name!r} has {len(self.levels)} levels", expected=f"{1 << self.bits}")

    @cached_property
    def table(self) -> FloatArray:
        """fp32 levels in code order, shape ``(2**bits,)``.

        >>> from halfbyte.formats import codebook
        >>> codebook("nf4").table[[0, 7, 15]].tolist()
        [-1.0, 0.0, 1.0]
        """
        return np.asarray(self.levels, np.float32)

    @cached_property
    def rank_to_code(self) -> tuple[int, ...]:
        """Codes in rising order of value (with a sign bit: of magnitude, the sign bit clear)."""
        codes = range(1 << self.bits) if self.sign_bit is None else range(1 << self.sign_bit)
        return tuple(sorted(codes, key=lambda code: (float(self.table[code]), code)))

    @cached_property
    def midpoints(self) -> FloatArray:
        """fp32 decision points between neighbours in ``rank_to_code`` order; a value above the i-th has rank > i.

        >>> from halfbyte.formats import codebook
        >>> codebook("fp4").midpoints[:2].tolist()
        [0.0026041667442768812, 0.0859375]
        """
        ordered = self.table[list(self.rank_to_code)]
        return ((ordered[:-1] + ordered[1:]) * np.float32(0.5)).astype(np.float32)

    @cached_property
    def zero_code(self) -> int:
        """The code that stands for exactly zero."""
        return self.levels.index(0.0)


_REGISTRY: dict[str, Codebook] = {}


def register(book: Codebook) -> Codebook:
    """Make ``book`` known by its name to every op. Returns it.

    Raises:
        ArgumentError: The name is taken.
    """
    if book.name in _REGISTRY:
        raise ArgumentError(f"a codebook named {book.name!r} is registered already", hint="choose another name")
    _REGISTRY[book.name] = book
    return book


def codebook(name: str) -> Codebook:
    """The registered codebook of that name.

    Raises:
        ArgumentError: No such codebook.
    """
    try:
        return _REGISTRY[name]
    except KeyError:
        raise ArgumentError(
            f"quant_type {name!r} is unknown",
            expected=f"one of {', '.join(sorted(_REGISTRY))}",
            hint="for LLM weights use 'nf4'",
        ) from None


def codebook_names(bits: int) -> tuple[str, ...]:
    """Names of the registered codebooks whose codes take ``bits`` bits, sorted.

    >>> codebook_names(4)
    ('af4', 'fp4', 'int4', 'nf4')
    """
    return tuple(sorted(name for name, book in _REGISTRY.items() if book.bits == bits))
