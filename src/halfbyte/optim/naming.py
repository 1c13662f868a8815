"""How optimizer classes call themselves."""

from __future__ import annotations

__all__ = ["NamedType"]


class NamedType(type):
    """Class of the optimizer classes: ``str(cls)`` also says which class of bitsandbytes it stands for.

    transformers' Trainer looks for "bitsandbytes" in that text before it keeps embeddings in 32 bits.

    >>> from halfbyte.optim import AdamW
    >>> AdamW
    <class 'halfbyte.optim.adamw.AdamW', in place of bitsandbytes.optim.AdamW>
    """

    def __repr__(cls) -> str:
        if not cls.__module__.startswith("halfbyte.optim."):
            return super().__repr__()
        return f"<class '{cls.__module__}.{cls.__qualname__}', in place of bitsandbytes.optim.{cls.__qualname__}>"
