"""What a rule may use beside operators, for NVIDIA: roots and quotients to about 2^-23, in one or two instructions.

Correctly rounded ones take ten times as many.

Subnormal operands count as zero: of a mean of squares that is the square of a gradient below 1e-19.
"""

import triton
import triton.language as tl

from halfbyte.backends.triton.kernels.arithmetic import maximum, minimum, where

__all__ = ["divide", "maximum", "minimum", "sqrt", "where"]


@triton.jit
def sqrt(x):
    """Square root."""
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def divide(x, y):
    """``x / y`` by the reciprocal; ``y`` between 2^-126 and 2^126."""
    return x * tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [y], dtype=tl.float32, is_pure=True, pack=1
    )
