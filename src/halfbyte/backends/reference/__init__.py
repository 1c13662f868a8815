"""The specification: every op in plain torch, on any device, exact before fast."""

from halfbyte.backends.reference import blockwise, embedding, four_bit, grouped, int8, optimizer

__all__ = ["blockwise", "embedding", "four_bit", "grouped", "int8", "optimizer"]
