"""What a rule may use beside operators, for Triton: a module that stands where a rule says ``xp``."""

import triton
import triton.language as tl

__all__ = ["divide", "maximum", "minimum", "sqrt", "where"]


@triton.jit
def sqrt(x):
    """Correctly rounded."""
    return tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    """``x / y``."""
    return x / y


@triton.jit
def where(condition, yes, no):
    """``yes`` where the condition holds, else ``no``."""
    return tl.where(condition, yes, no)


@triton.jit
def maximum(x, y):
    """The larger of two."""
    return tl.where(x > y, x, y)


@triton.jit
def minimum(x, y):
    """The smaller of two."""
    return tl.where(x < y, x, y)
