"""Kernels: only ``triton.jit`` and ``gluon.jit`` functions, and what they are built from."""
