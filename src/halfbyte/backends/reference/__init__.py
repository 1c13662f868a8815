"""The specification: every op in plain torch, on any device, exact before fast."""

from halfbyte.backends.reference import blockwise, four_bit, int8, optimizer

__all__ = ["blockwise", "four_bit", "int8", "optimizer"]
