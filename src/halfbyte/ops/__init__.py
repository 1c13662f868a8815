"""What can be computed: schemas, fakes and argument rules of ``torch.ops.halfbyte.*``; no arithmetic.

Importing this package defines the ops. Who computes them is decided in :mod:`halfbyte.backends.registry`.
"""

from halfbyte.ops import blockwise, embedding, four_bit, grouped, int8, optimizer
from halfbyte.ops.definition import bind, defined_ops

__all__ = ["bind", "blockwise", "defined_ops", "embedding", "four_bit", "grouped", "int8", "optimizer"]
